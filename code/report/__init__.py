"""What scripts write for people: the page of evaluate.py --report and the card of export.py."""
