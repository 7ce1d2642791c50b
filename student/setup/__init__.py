"""From options to a run: which cache serves a recipe, which views and targets it is shown."""
