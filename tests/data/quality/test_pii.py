from __future__ import annotations

import time

import pyarrow as pa
import pytest

from raylign.config import PiiConfig
from raylign.data.quality.pii import KINDS, count, scrub

ALL = PiiConfig(mails=True, ips=True, phones=True, secrets=True, cards=True)
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7\nabc=\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"

POSITIVE = {
    "mails": [
        "jane.doe@mail.company.org",
        "x+y_z%1@web.de",
        "jörg@müller.de",
        "A-B@sub-domain.co.uk",
    ],
    "ips": ["93.184.216.34", "8.8.4.200", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450::200e"],
    "phones": [
        "+49 30 1234567",
        "+1 (212) 555-2368",
        "+442079460958",
        "+33.1.23.45.67.89",
        "(212) 555-2368",
        "212-555-2368",
        "1-800-555-2368",
        "212.555.2368",
    ],
    "secrets": [
        "AKIA" + "2E0A8F3B244C9986",
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "11ABCDEFG0" * 3,
        "xoxb-" + "123456789012-abcdef",
        "hooks.slack.com/services/T000/B000/XXXX",
        "AIza" + "SyA-1_b" * 5,
        "sk-proj-" + "Ab3" * 8,
        "sk_live_" + "4eC39HqLyjWDarjt",
        JWT,
        KEY,
    ],
    "cards": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "378282246310005",
        "3782 822463 10005",
        "30569309025904",
        "6011111111111117",
    ],
}

NEGATIVE = [
    "",
    "a @ b.com, @handle, a@b, user@localhost, 5@6.7 and name@example.com",
    "127.0.0.1, 10.1.2.3, 192.168.0.17, 172.16.3.4, 169.254.10.10, 224.0.0.251, 0.0.0.0, 192.0.2.7",
    "version 12.0.3.44, v10.20.30.40, 3.2.1.4 Scope, 256.1.1.1, 1.20.300.4000, 11.22.33.44.55",
    "::1, fe80::1, 2001:db8::1, std::vector, add::fee, 12:30:45, 00:1B:44:11:3A:B7, 1:2:3",
    "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, 9780306406157, EAN 4006381333931",
    "2024-05-17 12:30:45, 17.05.2024, 1990-2000, 05/17/2024, 20240517123045",
    "$1,234,567.89, 1.234.567,89 EUR, +3.14159265, +1,000,000, 5+12345678901, +12345678 points",
    "4111111111111112, 4111-1111 1111-1111, 1234567812345670, 411111111111111, x4111111111111111",
    "112-555-2368, 212-155-2368, 200 300 4000, 212-555.2368, 1212-555-23689",
    "sk-learn-compatible-estimators-and-more, desk-top, task-based, sk-short1A",
    "AKIA1234, AKIAabcdefghijklmnop, ghp_short, xoxb-1, eyJ.eyJ.x, AIzaShort, PRIVATE KEY",
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A\n-----END PUBLIC KEY-----",
]


@pytest.mark.parametrize(
    ("kind", "value"), [(kind, value) for kind, values in POSITIVE.items() for value in values]
)
def test_each_form_is_replaced_whole(kind: str, value: str) -> None:
    only = PiiConfig.model_validate({kind: True})
    for frame in ("{}", "Write to {}.", "({}), then more", "é:\n{}\nend"):
        text, replaced = scrub(frame.format(value), only)
        assert text == frame.format(KINDS[kind].token)
        assert replaced == {kind: 1}


@pytest.mark.parametrize("text", NEGATIVE)
def test_near_misses_stay(text: str) -> None:
    assert scrub(text, ALL) == (text, {})


def test_everything_is_off_by_default() -> None:
    text = " ".join(value for values in POSITIVE.values() for value in values)
    assert scrub(text, PiiConfig()) == (text, {})


def test_each_kind_alone_leaves_the_others() -> None:
    text = "a.b@c.org 93.184.216.34 212-555-2368 4111111111111111 AKIA2E0A8F3B244C9986"
    for kind in KINDS:
        found = scrub(text, PiiConfig.model_validate({kind: True}))
        assert found[1] == {kind: 1}
    shown, replaced = scrub(text, ALL)
    assert shown == "<EMAIL> <IP> <PHONE> <CARD> <SECRET>"
    assert replaced == dict.fromkeys(KINDS, 1)


def test_fakes_are_nobodys_and_stay() -> None:
    text = "a.b@c.org 93.184.216.34 212-555-2368 4111111111111111 AKIA2E0A8F3B244C9986"
    fake = ALL.model_copy(update={"replacement": "fake"})
    shown, replaced = scrub(text, fake)
    assert replaced == dict.fromkeys(KINDS, 1)
    assert shown.split()[0] == "name@example.com"
    assert scrub(shown, ALL) == (shown, {})


def test_a_private_key_without_end_goes_with_its_lines() -> None:
    body = "-----BEGIN PRIVATE KEY-----\nMIIEowIBAAKCAQEA7b\nQUJDREVGR0hJSktMTQ\nNot base64 here."
    text, replaced = scrub(body, PiiConfig(secrets=True))
    assert text == "<SECRET>\nNot base64 here." and replaced == {"secrets": 1}


@pytest.mark.parametrize(
    "piece",
    [
        "1 ",
        "1.",
        "a@",
        "a.",
        "+1 2 3 ",
        "sk-",
        "eyJaaaaaaaaa.",
        "1:",
        "-----BEGIN PRIVATE KEY-----\n",
    ],
)
def test_time_grows_with_the_text_alone(piece: str) -> None:
    """Nothing here takes quadratic time: a second would be minutes."""
    text = "x@" + piece * (300_000 // len(piece)) + "@"
    started = time.process_time()
    scrub(text, ALL)
    assert time.process_time() - started < 20


def test_counts_agree_with_scrubbing() -> None:
    texts = [value for values in POSITIVE.values() for value in values] + NEGATIVE
    texts.append("mail a.b@c.org and c.d@e.org, call 212-555-2368")
    found = count(pa.chunked_array([pa.array(texts[:20]), pa.array(texts[20:])]))
    for row, text in enumerate(texts):
        assert {k: int(v[row]) for k, v in found.items() if v[row]} == scrub(text, ALL)[1]
    assert count([]) == {kind: pytest.approx([]) for kind in KINDS}
