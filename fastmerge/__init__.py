"""fastmerge: merge the weights of language models at the speed of memory."""
