"""Japanese texts get one form for each character."""

import pytest

from ssm_asr.data.japanese import normalise


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("ＣＤ－Ｒ を、２，０００ 枚〜。 ﾃﾞｰﾀーー", "CDRを2000枚データー"),
        # half and full width
        ("ﾃﾞｰﾀ ﾍﾞｰｽ", "データベース"),
        ("ＣＤ－Ｒ", "CDR"),
        ("ｗｅｂ", "WEB"),
        ("か\u3099", "が"),  # a combining mark
        ("㌔", "キロ"),
        # numerals
        ("２０００年", "2000年"),
        ("２，０００，０００円と3,5", "2000000円と35"),
        ("３．５", "3.5"),
        ("第３．", "第3"),
        (".5", "5"),
        ("⑤番", "5番"),
        ("二〇〇一 二○◯一", "二〇〇一二〇〇一"),
        ("三十", "三十"),  # the numerals stay as they are
        # long vowels
        ("えーー", "えー"),
        ("エー～〜", "エー"),
        ("スーパ―", "スーパー"),
        ("ラ－メン", "ラーメン"),
        ("んー", "んー"),
        ("一ー", "一ー"),
        # punctuation goes, other signs stay
        ("「はい」、そうです。（笑）…？！", "はいそうです笑"),
        ("東京・大阪／京都", "東京大阪京都"),
        ("５％＃＠＆", "5%#@&"),
        ("人々×〆", "人々×〆"),
        ("a　b\tc\n", "ABC"),
        ("", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal
    assert normalise(normal) == normal
