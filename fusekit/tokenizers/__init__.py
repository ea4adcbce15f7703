"""Vocabularies: union and alignment before a merge, and transplantation of a tokenizer."""
