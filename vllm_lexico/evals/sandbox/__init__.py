"""Programs that a model wrote, run where they can do no harm: `run` starts them, `child` holds them."""
