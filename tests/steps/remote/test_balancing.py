"""Which address a call goes to: rules without clock and network."""

from random import Random

from hypothesis import given, strategies as st

from servinggraph.steps.remote.balancing import Balancer, Ejection


def test_of_two_addresses_the_one_with_fewer_calls_is_taken():
    balancer = Balancer(["a", "b"])
    balancer.members[0].outstanding = 1
    assert {"b"} == {balancer.choose().value for _ in range(20)}


def test_load_spreads_as_two_choices_promise():
    balancer = Balancer(range(10), Random(1))
    for _ in range(10_000):
        balancer.choose().outstanding += 1
    calls = [member.outstanding for member in balancer.members]
    assert max(calls) - min(calls) <= 4  # one choice alone: around 100


def test_pauses_double_up_to_the_longest_and_start_anew_after_an_answer():
    policy = Ejection(failures=1, pause_ms=100, max_pause_ms=350)
    member = Balancer(["a"]).members[0]
    pauses = []
    for _ in range(4):
        pauses.append(member.failed(policy))
        member.admit()
    assert [0.1, 0.2, 0.35, 0.35] == pauses
    member.worked()
    assert 0.1 == member.failed(policy)


def test_after_a_good_probe_one_failure_is_enough():
    policy = Ejection(failures=3)
    member = Balancer(["a"]).members[0]
    assert [None, None, 1.0] == [member.failed(policy) for _ in range(3)]
    member.admit()
    assert 2.0 == member.failed(policy)


@given(
    ejected=st.lists(st.booleans(), min_size=1, max_size=6),
    outstanding=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    seed=st.integers(0, 100),
)
def test_each_address_is_offered_once_and_the_ejected_ones_last(ejected, outstanding, seed):
    balancer = Balancer(range(len(ejected)), Random(seed))
    for member, out, calls in zip(balancer.members, ejected, outstanding, strict=False):
        member.ejected, member.outstanding = out, calls
    tried = []
    while (member := balancer.choose(tried)) is not None:
        tried.append(member)
    assert sorted(range(len(ejected))) == sorted(member.value for member in tried)
    assert sorted(member.ejected for member in tried) == [member.ejected for member in tried]
