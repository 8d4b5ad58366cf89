"""What was set aside stays so, whatever happened to the file."""

from __future__ import annotations

from pathlib import Path

from cluster.runs.quarantine import FILE, put_in_quarantine, quarantined


def test_what_is_put_in_is_read_again_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    assert quarantined(tmp_path) == {}
    put_in_quarantine(tmp_path, {"prompt": "7", "where": "prompts.jsonl:8", "cause": "it kills"})
    put_in_quarantine(tmp_path, {"prompt": "9", "where": "", "cause": "auch"})
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write('{"prompt": "11", "cau')
    assert quarantined(tmp_path) == {"7": "it kills", "9": "auch"}
