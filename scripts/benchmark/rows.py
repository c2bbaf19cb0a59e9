"""Rows: one figure of one work, beside a peer's in the same run."""

import statistics


def middle(costs, figure):
    return statistics.median(getattr(cost, figure) for cost in costs)


def compare(work, ours, peer, goals, figures=("wall_seconds", "cpu_seconds", "stored_bytes", "peak_rss_bytes")):
    """One row per figure. `peer` is (name, costs); without costs it could not be measured, and nothing is met."""
    name, theirs = peer
    for figure in figures:
        if getattr(ours[0], figure) is None:
            continue
        value = middle(theirs, figure) if theirs and getattr(theirs[0], figure) is not None else None
        yield row(work, figure, middle(ours, figure), (name, value), goals.get(figure))


def row(work, figure, drctl, peer, goal):
    """A goal is the highest ratio that is good enough."""
    name, value = peer
    drctl = None if drctl is None else round(drctl, 4)
    ratio = drctl / value if drctl is not None and value else None
    met = None if goal is None or ratio is None else ratio <= goal
    return {"work": work, "figure": figure, "drctl": drctl, "peer": name,
            "peer_value": None if value is None else round(value, 4),
            "ratio": None if ratio is None else round(ratio, 3), "goal": goal, "met": met}


def shown(figure, value):
    if value is None:
        return "-"
    if figure.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if figure.endswith("_seconds"):
        return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"
    return f"{value:.0f}"


def table(rows):
    work = None
    for line in rows:
        if (line["work"], line["peer"]) != work:
            work = (line["work"], line["peer"])
            print(f"{line['work']}\n  {'':12}{'drctl':>10}  {line['peer'][:26]:>26}{'ratio':>7}{'goal':>6}")
        figure = line["figure"]
        label = figure.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
        goal = "" if line["goal"] is None else f"{line['goal']:.2f}"
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
        verdict = {True: "met", False: "MISSED", None: "not measured" if line["goal"] is not None else ""}[line["met"]]
        print(f"  {label:12}{shown(figure, line['drctl']):>10}  {shown(figure, line['peer_value']):>26}"
              f"{ratio:>7}{goal:>6}  {verdict}".rstrip())
