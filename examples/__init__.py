"""Complete programs that train with torchord; each one starts its own cluster or uses one that is up.

    python -m examples.digits                         scikit-learn's handwritten digits, in seconds
    python -m examples.fashion_mnist --data DIR       Fashion-MNIST from its IDX files
    python -m examples.char_gpt                       a small GPT on Python's own source code

`--help` of each lists the options. Workers import these modules by name, so on a cluster that is up
(`--url`) they are started in the directory that holds `examples/`.
"""
