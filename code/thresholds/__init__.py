"""What a similarity threshold decides about pairs of images, and about queries."""
