from __future__ import annotations

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from raylign.config import QualityConfig
from raylign.config.quality import LANGUAGES
from raylign.data.quality.language import HEAD_BYTES, identify

TEXTS = {
    "en": "The committee will meet again next week to discuss what should be done about it.",
    "de": "Der Ausschuss trifft sich nächste Woche wieder, um über die Maßnahmen zu sprechen.",
    "fr": "La commission se réunira de nouveau la semaine prochaine pour discuter des mesures.",
    "es": "El comité se reunirá de nuevo la próxima semana para hablar sobre las medidas.",
    "it": "Il comitato si riunirà di nuovo la prossima settimana per discutere delle misure.",
    "pt": "A comissão vai reunir-se novamente na próxima semana para discutir as medidas.",
    "nl": "De commissie komt volgende week weer bijeen om de maatregelen te bespreken.",
    "sv": "Kommittén träffas igen nästa vecka för att diskutera vad som bör göras åt det.",
    "pl": "Komisja spotka się ponownie w przyszłym tygodniu, aby omówić te środki.",
    "cs": "Výbor se sejde znovu příští týden, aby projednal opatření, která je třeba přijmout.",
    "tr": "Komite, alınması gereken önlemleri görüşmek üzere gelecek hafta yeniden toplanacak.",
    "fi": "Valiokunta kokoontuu ensi viikolla uudelleen keskustelemaan toimenpiteistä.",
    "hu": "A bizottság jövő héten újra összeül, hogy megvitassa a szükséges intézkedéseket.",
    "ru": "Комитет соберётся снова на следующей неделе, чтобы обсудить необходимые меры.",
    "uk": "Комітет знову збереться наступного тижня, щоб обговорити необхідні заходи.",
    "el": "Η επιτροπή θα συνεδριάσει ξανά την επόμενη εβδομάδα για να συζητήσει τα μέτρα.",
    "ar": "ستجتمع اللجنة مرة أخرى الأسبوع المقبل لمناقشة ما ينبغي القيام به حيال ذلك.",
    "he": "הוועדה תתכנס שוב בשבוע הבא כדי לדון בצעדים שיש לנקוט בנושא.",
    "hi": "समिति अगले सप्ताह फिर बैठक करेगी ताकि आवश्यक उपायों पर चर्चा की जा सके।",
    "ja": "委員会は来週また会合を開き、必要な対策について話し合う予定です。",
    "ko": "위원회는 다음 주에 다시 모여 필요한 조치에 대해 논의할 예정이다.",
    "zh": "委员会将于下周再次开会，讨论应该采取的措施。",
    "vi": "Ủy ban sẽ họp lại vào tuần tới để thảo luận về các biện pháp cần thiết.",
    "sr": "Комисија ће се поново састати следеће недеље да разговара о мерама.",
}


@pytest.fixture(scope="module")
def peer() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def test_languages_are_told_apart() -> None:
    languages, confidence = identify(list(TEXTS.values()))
    assert languages.tolist() == list(TEXTS)
    assert (confidence > 0.4).all() and (confidence <= 1).all()


def test_parity_with_py3langid(peer: LanguageIdentifier) -> None:
    texts = list(TEXTS.values())
    texts += [text.upper() for text in texts] + [text[:12] for text in texts]
    texts += [unicodedata.normalize("NFD", text) for text in texts]
    texts += [f"{text} {other}" for text, other in zip(texts, reversed(texts), strict=True)]
    texts += ["def f(x): return x", "1234 5678", "x", "OK", "ÄÖÜ", "😀"]
    languages, confidence = identify(pa.array(texts))
    for text, language, value in zip(texts, languages, confidence, strict=True):
        wanted, expected = peer.classify(text)
        if language == "und":
            assert expected <= 2 / len(peer.nb_classes) + 1e-6  # all classes alike
            continue
        ranked = dict(peer.rank(text))
        assert value == pytest.approx(expected, rel=1e-3)
        assert language == wanted or ranked[language] == pytest.approx(expected, rel=1e-3)


def test_codes_of_the_configuration_are_those_of_the_model(peer: LanguageIdentifier) -> None:
    assert set(LANGUAGES.split()) == {*peer.nb_classes, "und"}
    with pytest.raises(ValueError, match=r"'eng' is no language .* there are el, en, eo"):
        QualityConfig.model_validate({"language": {"allowed": ["de", "eng"]}})


def test_only_the_head_counts_and_no_character_is_split(peer: LanguageIdentifier) -> None:
    long = "日本語の文章です。" * 500
    head = long.encode()[:HEAD_BYTES].decode(errors="ignore")
    languages, confidence = identify([long, head, long + "Now English. " * 99])
    assert languages.tolist() == ["ja"] * 3
    assert len(set(confidence.tolist())) == 1
    assert confidence[0] == pytest.approx(peer.classify(head)[1], rel=1e-3)
    languages, _ = identify(["Und nun auf Deutsch. " + "Now English again. " * 50], head_bytes=20)
    assert languages.tolist() == ["de"]


def test_nothing_to_go_by() -> None:
    languages, confidence = identify(["", "\n", "a good word of English"])
    assert languages.tolist()[0] == "und" and confidence[0] == 0
    assert languages.tolist()[2] == "en"
    assert [len(part) for part in identify([])] == [0, 0]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    texts = list(TEXTS.values())
    whole = identify(pa.array(["x", *texts, "y"]).slice(1, len(texts)))
    alone = [identify([text]) for text in texts]
    assert whole[0].tolist() == [languages[0] for languages, _ in alone]
    assert np.array_equal(whole[1], [confidence[0] for _, confidence in alone])
