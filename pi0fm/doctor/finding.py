"""Finding of an examination, and its remedy.

Owns: `Finding`, its severities. Does not know: how it was found.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pi0fm_client.errors import Pi0fmError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Finding of an examination. kind: the word it is counted under; text: the rule and what was found; remedy: what to type."""

    severity: Severity
    kind: str
    text: str
    remedy: str = ""

    @classmethod
    def of(cls, kind: str, error: Pi0fmError) -> "Finding":
        """Make a finding of an error that was raised."""
        text, _, remedy = str(error).partition("; ")
        return cls("error", kind, text, remedy or "see the text")

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text

    def json(self) -> dict[str, str]:
        """Return the figures of the command's last line."""
        return asdict(self)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Sort errors first, then warnings, then notes, each in the order found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
