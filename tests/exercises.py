"""
The exercises of README.md as lab.py needs them. A function is named file::name or
file::Class.name; README.md and the tests named test_N_.. of test_exercises.py say the rest.
"""

from typing import NamedTuple


class Exercise(NamedTuple):
    goal: str
    minutes: int
    functions: tuple = ()  # emptied by `start`
    needs: tuple = ()      # exercises whose functions the tests of this one call
    twins: tuple = ()      # functions that give the answer away: a hand-out leaves them out


CORE = [1, 2, 3, 4, 5, 6, 7]
EXERCISES = {
    1: Exercise(
        "who sees what: the causal mask", 45,
        functions=("model.py::Attention.forward",),
        twins=("tests/test_model.py::ref_block", "tests/test_pretrained.py::llama")),
    2: Exercise(
        "the cascade of heads", 40,
        functions=("model.py::GPT.cascade",),
        twins=("tests/test_model.py::ref_logits", "tests/test_extend.py::cascade_by_hand")),
    3: Exercise(
        "the TopN divergence and the stop-gradient", 45,
        functions=("distill.py::topn_divergence",),
        twins=("tests/test_distill.py::slow_kl",
               "tests/test_distill.py::test_a_new_divergence_is_one_function_and_one_entry")),
    4: Exercise(
        "alignment by target, and the whole loss", 45,
        functions=("distill.py::aligned", "distill.py::mtp_d_loss"),
        needs=(3,),
        twins=("tests/test_distill.py::slow_loss",
               "tests/test_distill.py::test_the_plain_loss_is_the_loss_of_logits_that_are_aligned",
               "tests/test_train.py::slow_evaluation")),
    5: Exercise(
        "acceptance: AR and CAR", 30,
        functions=("decode.py::accepted_lengths", "decode.py::rates"),
        twins=("results/bench.py::rates_of_sums", "results/bench.py::accept_probs",
               "results/acceptance.py::reach_probs", "results/entropy.py::curves",
               "tests/test_bench.py::test_acceptance_when_sampling_against_a_slow_loop",
               "tests/test_decode.py::test_acceptance_equals_a_loop_over_positions",
               "tests/test_decode.py::test_the_benchs_acceptance_is_that_of_restricted_heads",
               "tests/test_train.py::slow_evaluation")),
    6: Exercise(
        "two simple accept rules", 30,
        functions=("decode.py::match", "decode.py::point"),
        twins=("tests/test_decode.py::emits_from_p_after_a_fixed_draft",)),
    7: Exercise(
        "the residual rule", 45,
        functions=("decode.py::residual",),
        twins=("decode.py::speculative_round", "tests/test_decode.py::accepts_by_q",
               "tests/test_decode.py::emits_from_p",
               "tests/test_acceptance.py::slow_rounds")),
    8: Exercise(
        "a whole round, without a cache", 60,
        functions=("decode.py::speculative_round",),
        needs=(1, 2)),
    9: Exercise(
        "positions and the cache", 40,
        functions=("model.py::rotate",),
        needs=(1, 2),
        twins=("tests/test_model.py::ref_turn",)),
    10: Exercise(
        "a divergence of your own", 45,
        functions=("distill.py::reverse_kl", "distill.py::total_variation"),
        twins=("tests/test_distill.py::slow_kl",)),
    11: Exercise("when to stop drafting", 45),
    12: Exercise("the draft window", 40),
    13: Exercise(
        "looped heads", 30,
        functions=("extend.py::loop_heads",),
        needs=(1, 2)),
    14: Exercise("predict the speed-up, then measure it", 45),
    15: Exercise("heads on the frozen real model", 60),
}
