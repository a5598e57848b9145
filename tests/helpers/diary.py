"""A callback that keeps what it is called with."""

import threading

from flwr_cloned_kd import Callback

METHODS = ("started", "asked", "arrived", "absorbed", "refused", "finished")


class Diary(Callback):
    """Keeps every call with its argument, and the threads of the calls."""

    def __init__(self):
        self.calls = []
        self.threads = set()

    def _keep(self, name, value):
        self.calls.append((name, value))
        self.threads.add(threading.current_thread())

    def names(self):
        return [name for name, _ in self.calls]

    def of(self, *names):
        return [value for name, value in self.calls if name in names]


for method in METHODS:
    setattr(Diary, method, lambda self, value, name=method: self._keep(name, value))
