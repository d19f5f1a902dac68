"""The `kafka:` block: what it takes, and what it refuses with which words."""

import pytest

from servinggraph import Graph
from servinggraph.errors import GraphInvalid, StepFailed
from servinggraph.kafka import KafkaOptions, OutputOptions, SecurityOptions

LEAST = {"brokers": "127.0.0.1:9092", "input": {"topics": ["in"], "group": "g"}, "output": {"topic": "out"}}


def compiled(**kafka):
    graph = Graph("g", {"x": ("FP32", [-1])}, kafka={**LEAST, **kafka})
    return graph.to(lambda x: x, "step").respond().compile().kafka


def test_the_least_that_a_block_needs_is_brokers_topics_and_a_group():
    options = compiled()

    assert ("at_least_once", "key", "auto", "earliest") == (
        options.delivery,
        options.order,
        options.format,
        options.input.start,
    )


@pytest.mark.parametrize(
    ("kafka", "text"),
    [
        ({"brokers": "nowhere"}, "each broker is 'host:port', got 'nowhere'"),
        ({"delivry": "x"}, "unknown key 'kafka.delivry'; did you mean 'delivery'?"),
        ({"delivery": "exactly"}, "'kafka.delivery': expected 'at_least_once', 'exactly_once' or 'at_most_once'"),
        ({"output": {}}, "answers have nowhere to go"),
        ({"output": {"reply_topics": ["r"]}}, "errors have nowhere to go"),
        ({"output": {"topic": "in"}}, "output.topic 'in' is read, too"),
        ({"errors": {"topic": "in"}}, "errors.topic 'in' is read, too"),
        ({"output": {"topic": "out", "key": "none"}}, "'order: key' needs 'output: {key: same}'"),
        ({"input": {**LEAST["input"], "settings": {"enable_auto_commit": True}}}, "input.settings: enable_auto_commit is what"),
        (
            {"input": {**LEAST["input"], "settings": {"isolation_level": "read_uncommitted", "session_timeout_ms": 60_000}}},
            "input.settings: isolation_level, session_timeout_ms is what this block decides",
        ),
        ({"output": {"topic": "out", "settings": {"acks": 1}}}, "output.settings: acks is what this block decides"),
        ({"max_waiting": 5}, "max_waiting 5 is below max_in_flight 256"),
        ({"security": {"protocol": "sasl_ssl"}}, "PLAIN needs 'username' and 'password'"),
        ({"security": {"username": "me"}}, "'protocol: plaintext' takes no user"),
        ({"security": {"ca": "ca.pem"}}, "'protocol: plaintext' takes no certificates"),
        ({"security": {"protocol": "ssl", "cert": "c.pem"}}, "'cert' and 'key' go together"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_compile_time(kafka, text):
    with pytest.raises(GraphInvalid) as refused:
        compiled(**kafka)

    assert text in str(refused.value)


def test_certificates_are_looked_for_from_the_graph_files_folder(tmp_path):
    block = "brokers: '127.0.0.1:9', security: {protocol: ssl, ca: certs/ca.pem, cert: /run/client.pem, key: /run/client.key}"
    (tmp_path / "graph.yaml").write_text(
        "graph: g\ninputs: {x: {datatype: FP32, shape: [-1]}}\n"
        f"nodes:\n  seen: {{step: publish, topic: seen, {block}}}\nanswer: seen\n"
        f"kafka: {{{block}, input: {{topics: [in], group: g}}, output: {{topic: out}}}}\n"
    )
    plan = Graph.load(tmp_path / "graph.yaml").compile()

    security = plan.kafka.security
    assert (str(tmp_path / "certs" / "ca.pem"), "/run/client.pem", "/run/client.key") == (
        security.ca,
        security.cert,
        security.key,
    )
    with pytest.raises(StepFailed, match=f"ca '{tmp_path}/certs/ca.pem'"):
        plan.nodes[0].work.load(None)


def test_a_password_is_in_no_text():
    security = SecurityOptions(protocol="sasl_plaintext", username="me", password="secret-word", key_password="other-word")
    options = KafkaOptions.model_validate({**LEAST, "security": security})

    assert "word" not in repr(options).replace("password", "")
    assert "secret-word" == options.client_settings()["sasl_plain_password"]


def test_reply_topics_are_patterns():
    output = OutputOptions(reply_topics=["replies.*", "answers"])

    assert [True, True, False] == [output.may_reply_to(topic) for topic in ("replies.a", "answers", "answers2")]


def test_a_graph_of_any_number_of_answers_reads_no_topics():
    def items(x):
        yield x

    graph = Graph("g", {"x": ("FP32", [-1])}, kafka=LEAST).to(items, "step").respond()
    with pytest.raises(GraphInvalid, match="'kafka' writes one answer for each record, and node 'step' gives any number"):
        graph.compile()


def test_sequences_need_an_order():
    graph = Graph("g", {"x": ("FP32", [-1])}, sequences={}, kafka={**LEAST, "order": "none"})
    with pytest.raises(GraphInvalid, match="'order: none' lets the requests of a sequence overtake each other"):
        graph.to(lambda x: x, "step").respond().compile()


def test_a_graph_with_topics_is_saved_and_read_back_as_it_was(tmp_path):
    graph = Graph("g", {"x": ("FP32", [-1])}, kafka={**LEAST, "delivery": "exactly_once"}).to("math:sqrt", "step").respond()
    graph.save(tmp_path / "graph.yaml")

    assert graph == Graph.load(tmp_path / "graph.yaml")


def test_a_certificate_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "ca.pem").write_text("nonsense")
    for file, text in (("ca.pem", "ca '.*ca.pem': "), ("none.pem", "ca '.*none.pem': No such file")):
        with pytest.raises(OSError, match=text):
            SecurityOptions(protocol="ssl", ca=str(tmp_path / file)).client_settings()
