"""An extension that was built in another checkout is taken only for the same sources."""

from pathlib import Path

import pytest

from sbf_dist.extension import load_built


def checkout(root: Path, source: str) -> Path:
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "ops.cpp").write_text(source)
    (root / "sbf_dist").mkdir()
    (root / "sbf_dist" / "_C.so").write_bytes(b"")
    return root


def test_an_extension_of_other_sources_is_refused(tmp_path: Path) -> None:
    built = checkout(tmp_path / "built", "one") / "sbf_dist" / "_C.so"
    other = checkout(tmp_path / "other", "two") / "csrc"
    with pytest.raises(ImportError, match=r"was built from another csrc/ than .* \(ops\.cpp\)"):
        load_built(built, other)


def test_an_extension_whose_sources_lack_a_file_is_refused(tmp_path: Path) -> None:
    built = checkout(tmp_path / "built", "one") / "sbf_dist" / "_C.so"
    other = checkout(tmp_path / "other", "one") / "csrc"
    (other / "new.cu").write_text("")
    with pytest.raises(ImportError, match=r"\(new\.cu\)"):
        load_built(built, other)


def test_an_extension_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"SBF_DIST_EXTENSION = .*_C\.so: does not exist"):
        load_built(tmp_path / "_C.so", tmp_path)
