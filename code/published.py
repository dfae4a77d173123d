"""Recall@K in percent of the released checkpoints (512-d, 224 px), as published by the authors."""

RESULTS: dict[tuple[str, str], dict[int, float]] = {
    ("cub", "bn_inception"): {1: 69.1, 2: 78.9, 4: 86.1, 8: 91.2},
    ("cub", "resnet50"): {1: 69.9, 2: 79.6, 4: 86.6, 8: 91.4},
    ("cars", "bn_inception"): {1: 86.4, 2: 91.9, 4: 95.0, 8: 97.0},
    ("cars", "resnet50"): {1: 87.7, 2: 92.7, 4: 95.5, 8: 97.3},
    ("SOP", "bn_inception"): {1: 79.2, 10: 90.7, 100: 96.2, 1000: 98.6},
    ("Inshop", "bn_inception"): {1: 91.9, 10: 98.1, 20: 98.7, 30: 99.0, 40: 99.1},
}
