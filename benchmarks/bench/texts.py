"""Real text that every Python has, for benchmarks that need some and judge no quality by it."""

import pydoc_data.topics

TEXT = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
