"""Training of dictionaries: texts -> capture -> learn -> levels, put together by `run.train_dictionary`."""
