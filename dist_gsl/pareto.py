"""The trade-off between accuracy and cost: non-dominated points, knee, hypervolume, choice under a constraint.

A point is (quality, cost): quality is to be high, cost low. Standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]


def dominates(a: Point, b: Point) -> bool:
    """Is `a` nowhere worse than `b`, and somewhere better?"""
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by rising cost. Of equal points the first is kept."""
    found: list[int] = []
    best = float("-inf")
    for i in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0], i)):
        if points[i][0] > best:
            found.append(i)
            best = points[i][0]
    return found


def hypervolume(points: Sequence[Point], *, reference: Point) -> float:
    """Area that the points dominate, bounded by a reference point of low quality and high cost.

    Points that do not dominate the reference add nothing. Unit: that of quality times that of cost.
    """
    inside = [point for point in points if point[0] > reference[0] and point[1] < reference[1]]
    area, quality = 0.0, reference[0]
    for i in front(inside):  # by rising cost and so by rising quality: one strip each
        area += (inside[i][0] - quality) * (reference[1] - inside[i][1])
        quality = inside[i][0]
    return area


def knee(points: Sequence[Point]) -> int | None:
    """Index of the front's point where giving up cost begins to cost much quality; None without points.

    It lies farthest above the line between the front's two ends, both axes scaled to the front's extent (the largest
    distance to the chord: Das, "On characterizing the knee of the Pareto curve", 1999). Of a front of one or two
    points, or a straight one, the cheapest.
    """
    indices = front(points)
    if not indices:
        return None
    (low_quality, low_cost), (high_quality, high_cost) = points[indices[0]], points[indices[-1]]
    if len(indices) < 3:
        return indices[0]

    def above(i: int) -> float:
        quality, cost = points[i]
        return (quality - low_quality) / (high_quality - low_quality) - (cost - low_cost) / (high_cost - low_cost)

    return max(indices, key=above)
