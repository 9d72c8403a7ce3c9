"""Memory that torch allocates."""

from torch.profiler import ProfilerActivity, profile


def peak(function):
    """Return the most bytes that torch held at once while ``function`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
