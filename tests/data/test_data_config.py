import pytest

from moejax.data import DataConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "stdlb"},
            "unknown corpus 'stdlb'; did you mean 'stdlib'? known: stdlib, text, markov, lm1b",
        ),
        ({"name": "stdlib/x"}, "unknown corpus 'stdlib/x'"),
        ({"name": "c4/"}, "unknown corpus 'c4/'"),
        ({"tokenizer": "byte"}, "unknown tokenizer 'byte'; known: bytes, bpe:N"),
        ({"tokenizer": "bpe:100"}, "bpe:100: the size must be 258 to 1048576"),
        ({"sequence": 1}, "sequence 1 is too short: at least 2"),
        ({"batch": 0}, "batch 0"),
        ({"validation": 0.0}, "validation 0.0"),
        ({"validation": 1.0}, "validation 1.0"),
        ({"mask_rate": 1.0}, "mask_rate 1.0 must be 0 (predict the next token) or a share below 1"),
        ({"max_documents": -1}, "max_documents -1"),
        ({"domains": "code"}, "domains must be a tuple of names, not the string 'code'"),
        ({"domains": ("code", "prose", "code")}, "names one of them twice"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(values, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_good_values_pass():
    DataConfig(name="wikipedia/20230601.en", tokenizer="bpe:4096")
    assert DataConfig(domains=["code"]).domains == ("code",)
