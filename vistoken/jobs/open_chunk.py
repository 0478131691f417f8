"""A chunk while a job works on it: which items are to be done, and what becomes of each."""

from dataclasses import dataclass

from vistoken.errors import ItemError
from vistoken.jobs.chunks import Item
from vistoken.jobs.counts import Account, Problem
from vistoken.jobs.run import Task


@dataclass(frozen=True)
class OpenChunk:
    """The items of a task, by their index in the file, and the problems found so far."""

    task: Task
    items: dict[int, Item]
    problems: dict[int, Problem]

    @classmethod
    def read(cls, task: Task) -> "OpenChunk":
        items = {item.index: item for item in task.source.table.read(task.chunk)}
        before = task.previous.problems if task.previous else []
        return cls(task, items, {problem.item: problem for problem in before if problem.kind == "rejected"})

    def done_before(self) -> list[int]:
        """Items that an earlier run did; its part has their results in this order."""
        if self.task.previous is None:
            return []
        not_done = {problem.item for problem in self.task.previous.problems}
        return [index for index in self.items if index not in not_done]

    def todo(self) -> list[Item]:
        """Items to do now: all of a new chunk, of one done before only those that failed."""
        settled = {*self.done_before(), *self.problems}
        return [item for index, item in self.items.items() if index not in settled]

    def fail(self, item: Item, error: ItemError) -> None:
        self.problems[item.index] = Problem.of(error, self.task.source.table.path, item)

    def close(self, done: int) -> tuple[Account, list[Problem]]:
        """The account and the problems, in input order, once `done` items are done and the rest have failed."""
        problems = [self.problems[index] for index in sorted(self.problems)]
        account = Account(items=len(self.items), done=done)
        account.reasons.update((problem.kind, problem.reason) for problem in problems)
        return account, problems
