"""How much text a score rests on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from iterbatch.language import _

FEW = 10  # documents; fewer are no sample


@dataclass(frozen=True)
class Scored:
    """What of a split is scored."""

    documents: int
    effective_documents: float  # of one length, that say as much (Kish): (sum of tokens)² / sum of squares
    tokens: int  # that the loss is on

    @classmethod
    def of(cls, document_tokens: Iterable[float]) -> Scored:
        """From the tokens of each document."""
        counts = [int(count) for count in document_tokens]
        tokens = sum(counts)
        return cls(len(counts), tokens**2 / max(1, sum(count**2 for count in counts)), tokens)

    @property
    def _documents(self) -> str:
        return f"{self.documents:,} document{'' if self.documents == 1 else 's'}"

    def __str__(self) -> str:
        """As a sentence shows it."""
        return _(
            "{documents} (as much as {effective_documents:,.1f} of one length), {tokens:,} tokens"
        ).format(documents=self._documents, effective_documents=self.effective_documents, tokens=self.tokens)

    def caution(self, split: str) -> str | None:
        """What to keep in mind where a split has few documents."""
        if self.effective_documents >= FEW:
            return None
        return _(
            "{split} scores {documents}, which say as much as {effective_documents:.1f} of one "
            "length; below {few}, a difference may be that of a single one"
        ).format(
            split=split, documents=self._documents, effective_documents=self.effective_documents, few=FEW
        )
