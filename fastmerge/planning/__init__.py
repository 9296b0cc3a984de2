"""From a recipe to a plan: one tree for each output tensor, made from headers alone."""
