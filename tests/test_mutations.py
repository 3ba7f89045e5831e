"""mutations.py: its list fits the code as it stands; and, slowly, every mistake in it is caught."""
import mutations
import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("n", range(len(MUTATIONS)))
def test_the_snippet_occurs_once_and_the_named_tests_exist(n):
    what, file, snippet, mistake, tests = MUTATIONS[n]
    assert (ROOT / file).read_text(encoding="utf-8").count(snippet) == 1, f"{what}: look for {snippet!r} in {file}"
    assert snippet != mistake and tests
    for test in tests:
        name, function = test.split("[")[0].split("::")
        assert f"def {function}(" in (ROOT / "tests" / name).read_text(encoding="utf-8"), test


@pytest.mark.slow
def test_every_mutation_is_caught(capsys):
    assert mutations.main(range(len(MUTATIONS))) == 0, capsys.readouterr().out
