"""Where the seconds of our own round go: what its processes noted, put in order.

A round is two exchanges: the task out and the masked updates back, then what unmasks their sum.
Each is told along the way of the reply that arrives last. What overlaps counts for the earlier
phase: the coordinator pulls a reply, for example, while the site still pushes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from our_rounds.notes import Event
from stock_flower.phases import Round

Mark = tuple[str, float]  # a phase and its end
Site = dict[str, dict[str, Event]]  # by message: its events by name

PAUSES = "coordinator pauses between polls"
BUSY = "coordinator is busy with earlier replies"


def phases_of_rounds(coordinator: Sequence[Event], sites: Iterable[Sequence[Event]]) -> list[Round]:
    """The seconds of every round, by phase."""
    by_message = [by_messages(site) for site in sites]
    made = []
    for begun, ended in pairwise(bounds_of_rounds(coordinator)):
        inside = [one for one in coordinator if begun <= one.began < ended]
        made.append(phases_of_round(inside, by_message, ended))
    return made


def bounds_of_rounds(coordinator: Sequence[Event]) -> list[float]:
    """When a round began, which is where the one before ended; the last one only ends."""
    return [event.began for event in coordinator if event.what.endswith("_task")]


def by_messages(events: Iterable[Event]) -> Site:
    """What a site did with every message that it answered."""
    found: Site = {}
    current: dict[str, Event] = {}
    for event in events:
        if event.what == "pull":
            current = {}
        current[event.what] = event
        if event.what == "push":
            found[event.ids[0]] = current
    return found


def phases_of_round(events: Sequence[Event], sites: Sequence[Site], ended: float) -> Round:
    """One round, from its task to the next one's."""
    once = {event.what: event for event in events}
    pending, summed, saved = (once[what] for what in ("save_pending", "secure_sum", "save"))
    task, unmask = first_push(events, 0.0), first_push(events, pending.began)
    marks = [
        ("task: coordinator makes and packs it", task.began),
        *exchange_marks("task", task, pulls_between(events, task, pending.began), sites),
        ("task: coordinator checks the last reply, adds it up", pending.began),
        ("coordinator saves the masked sum", pending.ended),
        ("unmask: coordinator makes and packs it", unmask.began),
        *exchange_marks("unmask", unmask, pulls_between(events, unmask, summed.ended), sites),
        ("unmask: coordinator checks the shares, removes the masks", summed.ended),
        ("coordinator makes the next model", saved.began),
        ("coordinator saves the model", saved.ended),
        ("coordinator looks who is there", ended),
    ]
    return seconds_between(events[0].began, marks, ended)


def first_push(events: Iterable[Event], since: float) -> Event:
    """The first of an exchange: who connects anew in it is asked once more."""
    return next(e for e in events if e.what == "push_messages" and e.began >= since)


def pulls_between(events: Iterable[Event], push: Event, ended: float) -> list[Event]:
    """The coordinator's questions of one exchange, up to the last that brought anything."""
    pulls = [e for e in events if e.what == "pull_messages" and push.ended <= e.began < ended]
    last = max(number for number, pull in enumerate(pulls) if pull.ids)
    return pulls[: last + 1]


def exchange_marks(
    kind: str, push: Event, pulls: Sequence[Event], sites: Sequence[Site]
) -> list[Mark]:
    """The way of the last reply."""
    came = pulls[-1]
    replies = [site[key] for site in sites for key in came.ids if key in site]
    last = max(replies, key=lambda events: events["push"].ended)
    waited_from = max(last["push"].ended, push.ended)
    gaps = ((a.ended, b.began) for a, b in pairwise(pulls) if not a.ids)
    paused = sum(max(0.0, until - max(since, waited_from)) for since, until in gaps)
    marks = [
        ("coordinator pushes", push.ended),
        *site_marks(last),
        (BUSY, max(waited_from, came.began - paused)),
        (PAUSES, came.began),
        ("coordinator pulls", came.ended),
    ]
    return [(f"{kind}: {name}", at) for name, at in marks]


def site_marks(events: dict[str, Event]) -> list[Mark]:
    """What the site did, in its order; only an upload is quantised and masked."""
    pull, push = events["pull"], events["push"]
    marks = [("site pauses between polls", pull.began), ("site pulls", pull.ended)]
    if "quantize" in events:
        quantize, journal = events["quantize"], events["record_upload"]
        marks += [("site checks", quantize.began), ("site quantises", quantize.ended)]
        marks += [("site masks", journal.began)]
    else:
        journal = events["record_answer"]
        marks += [("site checks and opens shares", journal.began)]
    return [
        *marks,
        ("site's journal", journal.ended),
        ("site logs and packs", push.began),
        ("site pushes", push.ended),
    ]


def seconds_between(begun: float, marks: Sequence[Mark], ended: float) -> Round:
    """Each phase begins where the one before ends; together they are the whole round."""
    seconds, now = {}, begun
    for name, mark in marks:
        reached = max(now, min(mark, ended))
        seconds[name] = reached - now
        now = reached
    return seconds
