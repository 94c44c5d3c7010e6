"""What the user sees of work that takes long: times in words, and a line of progress."""
import sys
import time


def duration(seconds):
    """A time for the user: 40 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f'{seconds:.0f} s'
    if seconds < 100 * 60:
        return f'{seconds / 60:.0f} min'
    return f'{seconds / 3600:.1f} h'


def progress(items, label, unit='clips', after=0):
    """
    Iterate over a sized collection, showing the share done, the rate and the time left on the terminal.

    after: the number of items that will follow it at the same rate. The time left then counts them, too.
    """
    terminal = sys.stdout.isatty()
    interval = 0.3 if terminal else 10
    total = len(items)
    start = shown = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        last = done == total
        if now - shown < interval and not last:
            continue
        shown = now
        seconds = now - start
        rate = done / (seconds + 1e-9)
        time_shown = f'{(total - done + after) / rate:.0f} s left'
        if after:
            time_shown += ' in all'
        if last:
            time_shown = f'{seconds:.0f} s'
        line = f'{label:<28} {done:>6}/{total} {done / total:>5.0%} {rate:8.1f} {unit}/s {time_shown}   '
        end = '\r' if terminal and not last else '\n'
        print(line, end=end, flush=True)
