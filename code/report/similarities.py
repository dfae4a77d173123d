"""The section of the report on similarities within and between classes, and on thresholds."""

import html
import math

import numpy as np

from proxy_anchor.files import printable
from proxy_anchor.spec import BOUNDS, MEASURES, Calibration
from proxy_anchor.thresholds.identification import Identification
from proxy_anchor.thresholds.intervals import Estimate
from proxy_anchor.thresholds.verification import Verification
from proxy_anchor.vectors import to_nearness

BINS = 80  # of the drawing
CURVE = np.linspace(0, 0.5, 51)  # shares of unknown queries that match
# Wording of the page for similarities and distances.
WORDS = {
    "cosine": {
        "measure": "cosine similarity",
        "measures": "Cosine similarities",
        "measured": "Similarities",
        "nearer": "more similar",
        "farther": "below it",
        "not_farther": "at or above it",
    },
    "euclidean": {
        "measure": "Euclidean distance",
        "measures": "Euclidean distances",
        "measured": "Distances",
        "nearer": "nearer",
        "farther": "above it",
        "not_farther": "at or below it",
    },
}


def chart(pairs: Verification, calibration: Calibration | None, size: int) -> str:
    """HTML with a chart of the similarities' distributions and the thresholds, and a text on them.

    calibration: the one recorded in the checkpoint, if any; size: of the gallery.
    """
    distance, words = pairs.distance, WORDS[pairs.distance]
    counts = {kind: counts for kind, counts in (("wrong", pairs.other), ("right", pairs.same)) if counts.any()}
    edges = pairs.scale.edges[:-1]
    high = 1 if distance == "cosine" else 0
    low = min([0, *edges[sum(counts.values(), np.zeros(len(edges))) > 0][:1]])
    span = high - low or 1
    similarity = ((edges + pairs.scale.edges[1:]) / 2).clip(low, high)  # of the pairs in each bin
    shares = {
        kind: np.histogram(similarity, BINS, (high - span, high), weights=numbers)[0] / numbers.sum()
        for kind, numbers in counts.items()
    }
    highest = max((values.max() for values in shares.values()), default=1)
    paths = "".join(
        f'<path class="{kind}" d="M0 100'
        + "".join(f"V{100 - 98 * share / highest:.1f}H{i + 1}" for i, share in enumerate(values))
        + 'V100Z"/>'
        for kind, values in shares.items()
    )
    legend = "".join(
        f'<li class="{kind}">{text}: mean {to_nearness(np.average(similarity, weights=counts[kind]), distance):.2f}, '
        f"{counts[kind].sum():,} pairs"
        for kind, text in (("right", "same class"), ("wrong", "different classes"))
        if kind in counts
    )
    lines = {}
    text = "<p>There are no pairs of both kinds, so there is no AUC and no threshold.</p>"
    if pairs.auc and pairs.equal_error:
        at, rate = pairs.equal_error
        at = at.measured(distance)
        lines["threshold"] = f"equal errors at {at.value:.2f}", at.value
        text = (
            f"<p>AUC {pairs.auc.percent()}: how often a same-class pair is "
            f"{words['nearer']} than a different-class pair; by chance, 50%.</p>"
            f"<p>At the threshold {at.text('{:.3f}')} the two error rates are equal: {rate.percent()} of the "
            f"same-class pairs are {words['farther']}, and as many of the different-class pairs "
            f"{words['not_farther']}.</p>"
        )
    if calibration:
        value, requested = calibration.at(size), f"{100 * calibration.share:g}%"
        lines["recorded"] = (f"threshold of the checkpoint {value:.2f}, for {requested} unknown matches", value)
        text += (
            f"<p>For {size:,} images, the checkpoint has the threshold {value:.3f}, chosen so that at most {requested} "
            f"of unknown queries match, on half of the test classes of {html.escape(printable(calibration.dataset))}; "
            f"on the other half, {Estimate(*calibration.unknown).percent()} did.</p>"
        )
    for kind, (label, value) in lines.items():
        at = BINS * (1 + (min(to_nearness(value, distance), high) - high) / span)
        paths += f'<path class="{kind}" d="M{at:.2f} 0V100"/>'
        legend += f'<li class="{kind}">{label}'
    quarters = np.arange(math.ceil(4 * low) / 4, 1.01, 0.25)
    ticks = "".join(
        f'<span style="left:{100 * (1 + (value - high) / span):.2f}%">{to_nearness(value, distance):.3g}</span>'
        for value in (quarters if distance == "cosine" else np.linspace(low, 0, 5))
    )
    return (
        f'<ul class="legend">{legend}</ul><div class="chart"><svg viewBox="0 0 {BINS} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="Distributions of similarities">{paths}</svg><div class="ticks">{ticks}</div></div>'
        + text
    )


def rates_table(pairs: Verification) -> str:
    """An HTML table of true accepts and thresholds at some rates of false accepts."""
    if not pairs.at_far:
        return f"<p>{html.escape(pairs.remark())}</p>"
    names = ["false accepts", "true accepts", f"{MEASURES[pairs.distance]} {BOUNDS[pairs.distance]}"]
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in pairs.table())
    body = body.replace(", ", ",&nbsp;")  # intervals stay in one line
    return f'<table class="rates">{head}{body}</table><p>{html.escape(pairs.remark())}</p>'


def open_set(found: Identification, calibration: Calibration | None) -> str:
    """HTML with the curve of known queries that are answered rightly over unknown ones that match; "" without any."""
    if found.classes < 1 or not (found.own > -np.inf).any():
        return ""
    known, width = found.curve(CURVE), len(CURVE) - 1
    line = "M" + "L".join(f"{x} {100 - 100 * share:.1f}" for x, share in enumerate(known))
    paths = f'<path class="right" style="fill:none" d="{line}"/>'
    text = ""
    if calibration:
        limit = to_nearness(calibration.at(found.size), found.distance)
        unknown, right = found.unknown(limit), found.known(limit)
        at = min(width * unknown.value / CURVE[-1], width)
        paths += f'<path class="recorded" d="M{at:.2f} 100V0"/>'
        text = (
            f"<p>With the threshold of the checkpoint, {to_nearness(limit, found.distance):.3f} for {found.size:,} "
            f"images, {unknown.percent()} of unknown queries match, and {right.percent()} of known ones are answered "
            "rightly.</p>"
        )
    ticks = "".join(f'<span style="left:{200 * share:.0f}%">{share:.0%}</span>' for share in CURVE[::10])
    return (
        "<h3>Known or new</h3><p>Upwards, from 0 to 100%: known queries whose nearest image is of their class and "
        "reaches a threshold. To the right: unknown queries, without their class in the gallery, that match at it.</p>"
        f'<div class="chart"><svg viewBox="0 0 {width} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Known queries answered rightly over unknown queries that match">{paths}</svg>'
        f'<div class="ticks">{ticks}</div></div>{text}'
    )
