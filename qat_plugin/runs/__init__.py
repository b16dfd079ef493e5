"""Running recipes: the ladder of models, its folder and record, interruption and progress."""
