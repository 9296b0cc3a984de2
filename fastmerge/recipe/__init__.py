"""mergekit's recipe language, checked as far as it can be without looking at a model."""
