"""What was found once and holds for its key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Memo:
    """Answers by key. When there are `most`, which strides without end could bring about, all are forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answers: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What `find` said when it was first asked for this key, which must name all that it depends on."""
        answer = self._answers.get(key)
        if answer is None:
            if len(self._answers) >= self._most:
                self._answers.clear()
            answer = self._answers[key] = find()
        return answer
