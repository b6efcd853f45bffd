"""What a run is: recipe, admission, config, plan, sum tree, codecs by name."""
