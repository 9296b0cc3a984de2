"""Scores of a model: what is asked, who scores it, what is kept, how sure one may be."""
