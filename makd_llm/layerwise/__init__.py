"""Going through a model one decoder layer at a time, as its files are read, and keeping what is
made of it: what factorizing a model and reshaping one share.
"""
