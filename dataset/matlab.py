"""Print the annotations of a MATLAB file of Cars-196 as JSON, [[path, class], ...]: python matlab.py FILE FIELD

A separate program, because scipy's reader crashes the process on some damaged files.
"""

import json
import sys

import numpy as np
from scipy.io import loadmat


def main():
    path, field = sys.argv[1:]
    annotations = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=["annotations"])["annotations"])
    rows = []
    for number, (name, label) in enumerate(zip(annotations[field], annotations["class"]), start=1):
        if not isinstance(name, str) or not np.issubdtype(np.asarray(label).dtype, np.integer) or np.size(label) != 1:
            raise ValueError(f"record {number}: expected a path and a class, found {name!r} and {label!r}"[:300])
        rows.append((name, int(label)))
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # scipy raises many kinds of errors on damaged files
        sys.exit(f"{type(error).__name__}: {error}")
