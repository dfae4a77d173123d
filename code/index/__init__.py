"""The index of search.py: vectors of images on disk, and the search in them."""
