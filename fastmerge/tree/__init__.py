"""The tree that makes one output tensor, and the algebra that makes it one combination."""
