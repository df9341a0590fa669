"""Trains the demo model that ships inside the package, from a text corpus and generated in-context tasks.

`python -m hma_serve.train_demo --corpus BOOKS.txt.gz --out DIR --minutes 8` does everything: tokenizer, training,
export as a Hugging Face directory, evaluation, model card. `python -m hma_serve.train_demo.evaluate` measures again.
"""
