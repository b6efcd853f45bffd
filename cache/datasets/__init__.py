"""The dataset store: library, reader, writer, samples, places, content, chunk cache."""
