"""
mutations.py: mistakes that people really make in this kind of code, put into a copy of it on purpose. The tests must notice.

    python tests/mutations.py            each mistake in turn: caught, or SURVIVED (minutes)
    python tests/mutations.py 3 7        these two
    python tests/mutations.py --list     the table, nothing is run

A mutation is (what went wrong, file, snippet, what the mistake makes of it, tests that must fail). The snippet occurs
exactly once in its file; where somebody wrote that line anew, the mutation is skipped (not in CI). Each test named must fail, or at least one of its cases where no [case] is named; a test that can't
be found or imported doesn't count as a failure. Before that, the same tests must all pass on the code as it is.
Add yours to the list. To see one by hand: make the change in your editor, run the tests, take it back with git.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MUTATIONS = [
    # ---- model.py: who sees what
    ("a leak: every row sees the whole text, and all heads look equally good", "model.py",
     "is_causal=True, dropout_p", "is_causal=False, dropout_p",
     ["test_model.py::test_changing_a_token_changes_nothing_before_it"]),
    ("[emb ; h] instead of [h ; emb]: a checkpoint trained the other way round decodes badly", "model.py",
     "torch.cat((hidden, embed), dim=-1)", "torch.cat((embed, hidden), dim=-1)",
     ["test_model.py::test_all_logits_equal_the_loop_reference[1-plain]"]),
    ("head k gets the token before its own, t_{i+k-1}", "model.py",
     "next_embed = embed[:, k:]", "next_embed = embed[:, k - 1 : -1]",
     ["test_model.py::test_a_row_sees_exactly_the_tokens_before_its_target"]),
    ("every head reads the trunk, so there is no cascade", "model.py",
     "head(states[-1][:, :T]", "head(states[0][:, :T]",
     ["test_model.py::test_all_logits_equal_the_loop_reference[3-plain]"]),
    ("[Module()] * n: K names for one head", "model.py",
     "nn.ModuleList(MTPHead(config) for _ in range(config.n_mtp))", "nn.ModuleList([MTPHead(config)] * config.n_mtp)",
     ["test_model.py::test_heads_share_no_weights_and_the_embedding_is_the_output_head"]),
    ("what adds to the residual stream starts as large as the rest", "model.py",
     "std = 0.02 / math.sqrt(2 * self.config.n_layer)", "std = 0.02",
     ["test_flags.py::test_initial_weights"]),
    ("embed_std is a field of the config and nothing more", "model.py",
     'self.config.embed_std if name == "embed.weight" else 0.02', "0.02",
     ["test_flags.py::test_initial_weights"]),
    ("heads share keys in turn, 0 1 0 1, where pretrained models have 0 0 1 1", "model.py",
     "q = rotate(q, positions.rope)",
     "q = rotate(q.unflatten(1, (-1, k.size(1))).transpose(1, 2).flatten(1, 2), positions.rope)",
     ["test_model.py::test_all_logits_equal_the_loop_reference[1-llama]"]),
    ("gate and value of the gated feed-forward, swapped", "model.py",
     "gate, y = y.chunk(2, dim=-1)", "y, gate = y.chunk(2, dim=-1)",
     ["test_model.py::test_all_logits_equal_the_loop_reference[1-llama]"]),
    ("rope_base is a field of the config and nothing more", "model.py",
     "base**-exponent", "10000.0**-exponent",
     ["test_model.py::test_all_logits_equal_the_loop_reference[1-llama]"]),

    # ---- model.py: the cache
    ("is_causal=True with a cache: wrong as soon as the queries are fewer than the keys", "model.py",
     "(share @ values).view_as(q)",
     "F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)",
     ["test_model.py::test_cached_steps_with_rollbacks_equal_the_full_forward[0-plain]"]),
    ("one slot too many is visible: the stale one, of a rejected draft", "model.py",
     "cache.slot > pos[:, None, :, None]", "cache.slot > pos[:, None, :, None] + 1",
     ["test_model.py::test_cached_steps_with_rollbacks_equal_the_full_forward[0-plain]"]),
    ("the first sequence's mask serves all: exact at batch 1, wrong at batch 4", "model.py",
     "cache.slot > pos[:, None, :, None]", "cache.slot > pos[:1, None, :, None]",
     ["test_model.py::test_cached_steps_with_rollbacks_equal_the_full_forward[0-plain]",
      "test_decode.py::test_greedy_text_is_that_of_plain_decoding[2]"]),
    ("while drafting, rotary positions count from the start of the window", "model.py",
     "self.rope[:, pos].unsqueeze(2)", "self.rope[:, pos - pos[:, :1]].unsqueeze(2)",
     ["test_model.py::test_cached_steps_with_rollbacks_equal_the_full_forward[0-plain]",
      "test_decode.py::test_cached_drafts_texts_and_counts_equal_those_by_hand[2]"]),

    # ---- distill.py
    ("labels shifted once too often", "distill.py",
     "targets[:, K:].flatten()", "targets[:, K - 1 : -1].flatten()",
     ["test_distill.py::test_a_head_that_predicts_what_the_main_head_predicts_has_no_divergence",
      "test_distill.py::test_the_comparison_sees_labels_or_a_teacher_shifted_by_one"]),
    ("heads compared at the same position, not at the same target", "distill.py",
     "hidden[k][:, K - k : T - k] for k in heads", "hidden[k][:, : T - K] for k in heads",
     ["test_distill.py::test_a_head_that_predicts_what_the_main_head_predicts_has_no_divergence"]),
    ("wrong denominator: a mean over positions that a head doesn't have", "distill.py",
     '*per_head(alpha, K, "alpha")]', '*(main_share * a for a in per_head(alpha, K, "alpha"))]',
     ["test_distill.py::test_everything_is_a_mean"]),
    ("the main head learns only the targets that every head predicts", "distill.py",
     "main_share = 1 - K / targets.size(1)", "main_share = 1.0",
     ["test_distill.py::test_loss_and_all_gradients_equal_the_slow_loss[forward-detach]"]),
    ("a mean of the chunks' means: the shorter last chunk counts as much as the others", "distill.py",
     "share = len(label) / len(labels)", "share = 1 / math.ceil(len(labels) / chunk)",
     ["test_distill.py::test_a_ragged_last_chunk_and_how_many_logits_are_alive"]),
    ("the teacher is not detached: the main head drifts towards its heads", "distill.py",
     "    if detach_teacher:\n", "    if False:\n",
     ["test_distill.py::test_detach_keeps_the_teacher_out"]),
    ("the top N are the student's", "distill.py",
     "teacher, top = teacher.topk(n, sorted=False)",
     "top = student.topk(n).indices\n        teacher = teacher.gather(-1, top)",
     ["test_distill.py::test_five_tokens_worked_by_hand"]),
    ("KL the wrong way round, as happens with the arguments of F.kl_div", "distill.py",
     "DIVERGENCES[kl](log_p, log_q)", "DIVERGENCES[kl](log_q, log_p)",
     ["test_distill.py::test_five_tokens_worked_by_hand"]),
    ("the hybrid KL is the sum of the two, not their mean", "distill.py",
     "reverse_kl(log_p, log_q)) / 2", "reverse_kl(log_p, log_q))",
     ["test_distill.py::test_five_tokens_worked_by_hand"]),
    ("sums over a bf16 vocabulary in bf16", "distill.py",
     "return logits if logits.dtype == torch.float64 else logits.float()", "return logits",
     ["test_distill.py::test_bf16_logits_are_reduced_in_float32[forward]"]),
    ("the last, shorter chunk is forgotten", "distill.py",
     "labels.split(chunk)", "labels[: len(labels) // chunk * chunk].split(chunk)",
     ["test_distill.py::test_a_ragged_last_chunk_and_how_many_logits_are_alive"]),
    ("all K logits alive at once: right, but out of memory on a real vocabulary", "distill.py",
     "while size > 1 and size * logits_per_target > at_most:", "while False:",
     ["test_distill.py::test_chunks_cover_all_targets_and_stay_small"]),

    # ---- decode.py: the plain round
    ("after a rejection the plain round emits from p, not from (p - q)+", "decode.py",
     "sample(residual_probs(p, q), noise.emit[0])", "sample(p, noise.emit[0])",
     ["test_decode.py::test_a_plain_round_emits_the_target_distribution[5-2]"]),
    ("the plain round accepts with min(1, q / p)", "decode.py",
     "bernoulli(p[x] / q[x], noise.accept[0, k])", "bernoulli(q[x] / p[x], noise.accept[0, k])",
     ["test_decode.py::test_a_plain_round_emits_the_target_distribution[5-2]"]),

    # ---- decode.py: the accept rules
    ("p and q swapped in the accept rule", "decode.py",
     "num_accepted(bernoulli(p / q, noise.accept))", "num_accepted(bernoulli(q / p, noise.accept))",
     ["test_decode.py::test_each_rule_emits_the_target_distribution_and_accepts_as_often_as_it_should[residual-random]"]),
    ("after a rejection emit from p, not from (p - q)+", "decode.py",
     "sample(residual_probs(p, q), noise.emit)", "sample(p, noise.emit)",
     ["test_decode.py::test_each_rule_emits_the_target_distribution_and_accepts_as_often_as_it_should[residual-random]"]),
    ("no guard for 0/0 where p == q", "decode.py",
     "return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)", "return rest",
     ["test_decode.py::test_a_rejection_that_only_rounding_can_cause_still_emits_a_possible_token"]),
    ("an argmax draft is judged as if it had been sampled from q", "decode.py",
     "draft = sample(probs, noise[:, 0])", "draft = argmax(logits)",
     ["test_decode.py::test_texts_with_true_randomness_follow_the_distribution_and_the_seed[residual]"]),
    ("reseeded before every round: each number is random, the text is not", "decode.py",
     "self.noise.numbers.exponential_(generator=self.generator)",
     "self.noise.numbers.exponential_(generator=torch.Generator().manual_seed(0))",
     ["test_decode.py::test_plain_rounds_and_the_decoder_give_the_same_text[0.8]"]),
    ("the random numbers that accept a draft also sample the next token", "decode.py",
     "(-1, V)), accept, emit)", "(-1, V)), emit[:, :K], emit)",
     ["test_decode.py::test_the_random_numbers_of_a_round_are_one_call_and_each_serves_one_purpose[residual]"]),
    ("the bonus token after full acceptance comes from row K-1, not from row K", "decode.py",
     "token = select_row(choices, accepted)", "token = select_row(choices, accepted.clamp_max(self.heads - 1))",
     ["test_decode.py::test_greedy_text_is_that_of_plain_decoding[2]"]),

    ("top_k keeps all logits that equal the k-th", "decode.py",
     "torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)",
     "logits.masked_fill(logits < top.values[..., -1:], -torch.inf)",
     ["test_decode.py::test_top_k_keeps_exactly_k_of_equal_logits"]),

    ("a drawn draft is dropped where its own probability is small: which drafts are judged depends on them", "decode.py",
     "accepted = num_accepted(bernoulli(p / q, noise.accept))",
     "accepted = num_accepted(bernoulli(p / q, noise.accept) & (q > 0.4))",
     ["test_heads.py::test_the_distribution_stays_whatever_number_of_heads_runs[residual-ks1]"]),

    # ---- decode.py: the loop
    ("rows that were built from rejected drafts are not rebuilt", "decode.py",
     "self.window(1 - self.width, 0)", "self.window(0, 0)",
     ["test_decode.py::test_cached_drafts_texts_and_counts_equal_those_by_hand[2]"]),
    ("after full acceptance head 1 lacks the keys and values of the last round's first row", "decode.py",
     "self.window(1 - self.width, 0)", "self.window(2 - self.width, 0)",
     ["test_decode.py::test_cached_drafts_texts_and_counts_equal_those_by_hand[1]",
      "test_decode.py::test_the_draft_distribution_is_that_of_its_head"]),
    ("a head that sat out comes back without the rows that it missed", "decode.py",
     "self.valid[: self.k + 1] = self.n - self.k - 1", "self.valid[:] = self.n - self.k - 1",
     ["test_heads.py::test_drafts_are_those_without_a_cache_under_random_numbers_of_heads[2-256]",
      "test_heads.py::test_draft_distributions_are_those_without_a_cache_under_random_numbers[residual]",
      "test_heads.py::test_a_prompt_and_a_long_pause_are_made_up_for_in_pieces"]),
    ("with fewer heads the window is shorter, and rows of rejected drafts before it stay", "decode.py",
     "self.valid[: self.k + 1] = self.n - self.k - 1", "self.valid[: self.k + 1] = self.n - k - 1",
     ["test_heads.py::test_drafts_are_those_without_a_cache_under_random_numbers_of_heads[4-256]",
      "test_heads.py::test_draft_distributions_are_those_without_a_cache_under_random_numbers[residual]"]),
    ("a new tensor where a recorded round (a CUDA graph) reads and writes the old one", "decode.py",
     "self.accepted.zero_()", "self.accepted = torch.zeros_like(self.accepted)",
     ["test_heads.py::test_a_round_reads_the_same_memory_whenever_its_number_of_heads_comes_again"]),
    ("several heads come back, and only the last reads what they missed", "decode.py",
     "self.rebuild(range(lacking[0], k + 1), rows[k])", "self.rebuild([k], rows[k])",
     ["test_heads.py::test_drafts_are_those_without_a_cache_under_random_numbers_of_heads[4-256]",
      "test_heads.py::test_a_wide_draft_window_saves_rebuilding_and_changes_no_draft"]),
    ("heads that come back read the first piece of what they missed, not all of it", "decode.py",
     "self.model.head_step(k, tokens, self.cache, positions)\n        return",
     "self.model.head_step(k, tokens, self.cache, positions)\n            break\n        return",
     ["test_heads.py::test_a_prompt_and_a_long_pause_are_made_up_for_in_pieces"]),
    ("head k+1 reads what stood in the buffer before, not head k's draft", "decode.py",
     "torch.where(at == last, draft[:, None], self.buffer[self.seq, at])",
     "self.buffer[self.seq, at]",
     ["test_decode.py::test_cached_drafts_texts_and_counts_equal_those_by_hand[2]"]),
    ("the text goes on after a stop token inside an accepted block", "decode.py",
     "self.limit.copy_(torch.minimum(stops.amin(1), self.limit))", "pass",
     ["test_decode.py::test_what_is_cut_from_an_accepted_block_is_neither_emitted_nor_counted"]),
    ("a stop token among the rejected drafts ends the text", "decode.py",
     "is_stop = emitted & (self.buffer", "is_stop = (self.buffer",
     ["test_decode.py::test_greedy_text_is_that_of_plain_decoding"]),
    ("drafts cut off by the stop token or by max_new_tokens still count as accepted", "decode.py",
     "emitted_drafts = torch.minimum(accepted, count)", "emitted_drafts = accepted",
     ["test_decode.py::test_what_is_cut_from_an_accepted_block_is_neither_emitted_nor_counted"]),
    ("a finished sequence of a batch goes on counting", "decode.py",
     "(count > 0).long()", "torch.ones_like(count)",
     ["test_decode.py::test_what_is_cut_from_an_accepted_block_is_neither_emitted_nor_counted"]),
    ("no slots for a draft that overshoots the end of the context", "decode.py",
     "slots = length + model.config.n_mtp + 1", "slots = length + 1",
     ["test_decode.py::test_the_end_of_the_context_is_reached_and_not_passed"]),
    ("counters are not reset between two calls", "decode.py",
     "self.accepted.zero_()", "pass",
     ["test_decode.py::test_a_decoder_used_again_remembers_nothing"]),
    ("acceptance against the text's own tokens, not the main head's choice", "train.py",
     "choices = [logits.argmax(-1) for logits in all_logits]",
     "choices = [tokens[:, 1:]] + [logits.argmax(-1) for logits in all_logits[1:]]",
     ["test_train.py::test_evaluation_against_a_slow_loop"]),
    ("a head counts as accepted although an earlier one was rejected", "decode.py",
     "num_accepted(torch.stack(ok, dim=1)) - 1", "torch.stack(ok, dim=1).int().sum(1) - 1",
     ["test_decode.py::test_acceptance_of_a_handmade_example"]),
    ("the picture of a trace lacks its first line", "decode.py",
     "enumerate(rounds)", "enumerate(rounds[1:])",
     ["test_flags.py::test_svg_is_the_trace_in_a_file"]),

    # ---- fast/heads.py
    ("a head that did not run counts as rejected, and never runs again", "fast/heads.py",
     "judged = (reached - recent.diagonal())[:-1]", "judged = reached[:-1]",
     ["test_heads.py::test_rounds_with_fewer_heads_judge_only_the_heads_that_ran",
      "test_heads.py::test_what_was_counted_long_ago_fades_and_a_head_that_sat_out_is_tried_again"]),
    ("the number of heads depends on the text that was decoded before", "fast/heads.py",
     "if now < 0:  ", "if False:  ",
     ["test_heads.py::test_the_same_seed_is_the_same_text_and_watching_changes_nothing"]),
    ("a Decoder that is used again has forgotten its last text only in part", "fast/heads.py",
     "self.past = 0\n        elif", "pass\n        elif",
     ["test_heads.py::test_the_same_seed_is_the_same_text_and_watching_changes_nothing"]),
    ("auto is told how much was left before these rounds", "decode.py",
     "left = decoder.remaining()\n        decoder.choose(left)",
     "decoder.choose(left)\n        left = decoder.remaining()",
     ["test_heads.py::test_auto_is_told_how_much_is_left"]),
    ("nothing is forgotten: a head that was once bad stays out", "fast/heads.py",
     "max(0, 1 - self.memory / max(1, recent.sum()))", "0",
     ["test_heads.py::test_what_was_counted_long_ago_fades_and_a_head_that_sat_out_is_tried_again"]),
    ("that heads which come back must fill their caches costs nothing", "fast/heads.py",
     "times += CATCH_UP", "times += 0",
     ["test_heads.py::test_a_change_must_pay_before_the_text_ends"]),
    ("a batch costs what one sequence does", "fast/heads.py",
     "rows = batch * (k + 1)", "rows = k + 1",
     ["test_heads.py::test_costs_by_the_weights_that_are_read"]),

    # ---- train.py
    ("gradients of micro-batches are added up, not averaged", "train.py",
     "(loss / len(parts)).backward()", "loss.backward()",
     ["test_train.py::test_accumulation_does_not_change_the_result"]),
    ("a checkpoint is written in place: an interrupted write leaves half of it", "common.py",
     "torch.save(content, part)", "torch.save(content, path)",
     ["test_train.py::test_an_interrupted_save_keeps_the_old_checkpoint"]),
    ("dropout depends on where the generator stands: resuming is not exact", "train.py",
     "torch.manual_seed(hash((cfg.seed, step, rank)))", "pass",
     ["test_train.py::test_resume_equals_uninterrupted"]),
    ("the weights of a compiled model are saved with the prefix _orig_mod.", "common.py",
     "model.state_dict(), **meta}", '{"_orig_mod." + name: w for name, w in model.state_dict().items()}, **meta}',
     ["test_train.py::test_log_checkpoint_and_json"]),
    ("a checkpoint that lacks weights loads without a word", "common.py",
     "load_state_dict(weights, assign=True)", "load_state_dict(weights, strict=False, assign=True)",
     ["test_common.py::test_a_checkpoint_with_wrong_contents"]),
    ("two runs write one temporary file: the checkpoint is half of each", "common.py",
     'temporary(path, "part")  ', 'path.with_name(path.name + ".part")  ',
     ["test_common.py::test_two_processes_may_write_one_checkpoint"]),
    ("a checkpoint is resumed where it once was, over another run's only checkpoint", "train.py",
     '        "out": str(path.parent),\n', "",
     ["test_train.py::test_a_moved_checkpoint_is_resumed_where_it_lies"]),
    ("a new run replaces the checkpoint of an earlier one", "train.py",
     "keep_old(cfg.out)", "pass",
     ["test_train.py::test_a_new_run_keeps_the_old_one", "test_extend.py::test_nothing_of_another_run_is_overwritten"]),
    ("resuming best.pt replaces the newer ckpt.pt beside it", "train.py",
     "if target.exists() and", "if False and",
     ["test_train.py::test_resuming_overwrites_no_other_checkpoint"]),
    ("--weight_decay and --beta2 have no effect on a resumed run", "train.py",
     '{**optimizer.state_dict(), "state": state["state"]}', "state",
     ["test_train.py::test_resume_does_what_the_flags_say"]),
    ("more --steps begin the schedule anew: the learning rate jumps, the KL goes off", "train.py",
     '        "schedule_steps": stored.schedule_steps or stored.steps,\n', "",
     ["test_train.py::test_more_steps_keep_what_was_reached"]),
    ("a run is resumed on another text, and its best loss compared across the two", "train.py",
     'if same_text and before != meta[name]:', "if False:",
     ["test_train.py::test_resume_equals_uninterrupted"]),
    ("--dtype float32 has no effect on a float64 checkpoint", "train.py",
     "torch.float64 if dtype == torch.float64 else torch.float32", "torch.float64 if dtype == torch.float64 else None",
     ["test_train.py::test_resume_does_what_the_flags_say"]),
    ("an evaluation that runs out of memory takes all steps with it", "train.py",
     '    save_checkpoint(out / "ckpt.pt", model, **state)\n',
     "    evaluate(model, val_ids, cfg, model.weight.device, dtype)\n"
     '    save_checkpoint(out / "ckpt.pt", model, **state)\n',
     ["test_train.py::test_an_evaluation_that_fails_loses_no_steps"]),
    ("moments of other shapes reach fused AdamW, which reads past the end of a tensor", "train.py",
     'check_moments(model, groups, state["state"])', "pass",
     ["test_train.py::test_a_checkpoint_with_wrong_entries_is_not_resumed"]),
    ("a --micro_batch that was asked for is halved without a word", "train.py",
     "if cfg.micro_batch or size == 1:", "if size == 1:",
     ["test_train.py::test_as_many_windows_as_fit_into_memory"]),
    ("--device cpu on a computer with a GPU trains the GPU's preset", "train.py",
     'given.get("device", "auto") in ("auto", "cuda")', "True",
     ["test_train.py::test_device_cpu_takes_the_preset_for_a_cpu"]),
    ("new heads without a loss: the extension trains nothing", "extend.py",
     "if not any(map(any, new)):", "if False:",
     ["test_extend.py::test_heads_that_learned_nothing_can_not_be_extended_silently",
      "test_extend.py::test_flags_by_which_new_heads_would_learn_nothing"]),
    ("of a weight for each new head, the last one is taken for all", "extend.py",
     "[0.0] * m + weights", "[0.0] * m + weights[-1:] * (n - m)",
     ["test_extend.py::test_a_weight_for_each_new_head"]),
    ("each kind of prompts is compared with one head on all of them", "results/bench.py",
     'one_head.get(row["kind"])', 'one_head.get("")',
     ["test_bench.py::test_each_kind_has_its_own_one_head"]),
    ("validation text is trained on", "data/prepare.py",
     "both = paths_of(source) & paths_of(val)", "both = set()",
     ["test_prepare.py::test_a_validation_text_that_would_be_trained_on"]),
    ("another vocabulary's ids are prompts", "data/selftext.py",
     'if prepared["tokenizer"] != tokenizer.spec:', "if False:",
     ["test_selftext.py::test_their_text_must_be_in_their_tokenizer"]),
    ("a round drafts one token at most", "decode.py",
     "heads = min(heads, room - 1) ", "heads = min(heads, room - 1, 1) ",
     ["test_exercises.py::test_8_drafts_are_accepted"]),
    ("two processes extend, and each believes that it is alone", "extend.py",
     "device = train.join_processes(cfg)", "device = torch.device(cfg.device)",
     ["test_extend.py::test_two_processes_extend_as_one_does"]),
    ("a resumed run is not evaluated: the best.pt that a killed run had no time for never comes",
     "train.py", "if start > 0 or cfg.steps == 0:", "if cfg.steps == 0:",
     ["test_train.py::test_a_best_that_was_never_written_is_written_by_resume",
      "test_train.py::test_a_run_at_its_end_is_evaluated_again"]),
    ("with several processes the log has rank 0's own windows", "train.py",
     "torch.distributed.all_reduce(value)", "value = value * world",
     ["test_train.py::test_two_processes_equal_one"]),
    ("what torch.compile can't do is left out although it was asked for", "train.py",
     'if cfg.compile != "auto" or cfg.fast == "on":\n            raise',
     'if cfg.compile != "auto" or cfg.fast == "on":\n            pass',
     ["test_train.py::test_compile_asked_for_by_name_raises"]),
    ("the checksums of a checkpoint are not compared", "common.py",
     "damaged = file.testzip()", "damaged = None",
     ["test_common.py::test_no_flipped_byte_changes_a_weight_unnoticed", "test_common.py::test_a_wrong_checksum_is_told"]),
    ("a weight that is not finite is loaded", "common.py",
     "if not (weight.is_contiguous() and weight.isfinite().all()):",
     "if not weight.is_contiguous():",
     ["test_common.py::test_a_checkpoint_with_wrong_contents"]),
    ("every ValueError is shown in one line, a programmer's mistake too", "common.py",
     "except UserError as error:", "except ValueError as error:",
     ["test_train.py::test_a_programmers_mistake_keeps_its_traceback"]),
    ("a character that the output can't encode ends the run", "common.py",
     'stream.reconfigure(errors="backslashreplace")', "pass",
     ["test_common.py::test_printing_never_fails_a_run"]),
    ("nan passes every check of a range", "common.py",
     "good = low <= value <= high", "good = not (value < low or value > high)",
     ["test_common.py::test_a_flag_outside_its_range", "test_train.py::test_bad_flags"]),
    ("the learning-rate schedule is logged, and never reaches the optimizer", "train.py",
     'group["lr"] = lr_at(cfg, step)', 'group["lr"] = cfg.lr',
     ["test_train.py::test_the_schedule_reaches_the_optimizer",
      "test_flags.py::test_the_first_step_has_the_schedules_learning_rate",
      "test_flags.py::test_a_flag_of_training_changes_the_weights[min_lr]"]),
    ("autocast is never on: bfloat16 is printed, float32 is computed", "common.py",
     "enabled=dtype == torch.bfloat16", "enabled=False",
     ["test_flags.py::test_bfloat16_reaches_training_and_evaluation"]),
    ("gradients are not clipped", "train.py",
     "    if cfg.clip:\n", "    if False:\n",
     ["test_flags.py::test_a_flag_of_training_changes_the_weights[clip]"]),
    ("the same dropout at every step", "train.py",
     "hash((cfg.seed, step, rank))", "hash((cfg.seed, 0, rank))",
     ["test_flags.py::test_the_seed_and_the_step_reach_the_dropout"]),
    ("--top_n never reaches the loss", "train.py",
     "ramp=ramp_at(cfg, step), top_n=cfg.top_n,", "ramp=ramp_at(cfg, step), top_n=0.1,",
     ["test_flags.py::test_a_flag_of_training_changes_the_weights[top_n]"]),
    ("--fast off leaves the fused kernels on", "train.py",
     'if cfg.fast != "off":', "if True:",
     ["test_flags.py::test_fast_picks_the_fused_loss[train]"]),
    ("--seed changes batches and dropout, but not the initial weights", "train.py",
     "torch.manual_seed(cfg.seed)", "torch.manual_seed(1)",
     ["test_flags.py::test_the_seed_reaches_the_initial_weights"]),
    ("the logits of all windows are alive at once in the evaluation", "train.py",
     "    for start in starts:",
     "    every = [model.all_logits(get_batch(val_ids, [start], T, device)[:, :-1]) for start in starts]\n"
     "    for start in starts:",
     ["test_train.py::test_evaluation_keeps_the_logits_of_one_window"]),
    ("heads are evaluated on targets that not all of them predict", "train.py",
     "logits, targets = distill.aligned(all_logits, tokens[:, 1:], range(K + 1))",
     "logits = torch.stack([x[0, : T - K] for x in all_logits])\n        targets = tokens[0, K + 1 :]",
     ["test_train.py::test_evaluation_against_a_slow_loop"]),

    # ---- results/bench.py
    ("the acceptance of a fixed draft is that of a sampled one, and the other way round", "results/bench.py",
     '        if accept in decode.FIXED_DRAFT:\n', '        if accept not in decode.FIXED_DRAFT:\n',
     ["test_bench.py::test_acceptance_when_sampling_against_a_slow_loop"]),
    ("the predicted speedup is upside down", "results/bench.py",
     "predicted_speedup=expected * ms_step / ms_round", "predicted_speedup=expected * ms_round / ms_step",
     ["test_bench.py::test_rows_with_a_clock_that_counts_forwards"]),
    ("Ctrl-C throws away what the bench has measured", "results/bench.py",
     "        bar.close()\n    count = min", "        bar.close()\n        raise\n    count = min",
     ["test_bench.py::test_what_was_measured_before_ctrl_c_is_printed"]),

    # ---- results/acceptance.py
    ("a median over prompts: a few easy texts count as much as all forwards together", "results/acceptance.py",
     "float(top.sum() / bottom.sum())", "float(np.median(top / bottom))",
     ["test_acceptance.py::test_tokens_per_forward_are_totals"]),
    ("rounds begin everywhere, not only behind what the last one accepted", "results/acceptance.py",
     "begins[i + 1 : i + K + 2] += begins[i] * exactly[i]", "begins[i + 1] += begins[i]",
     ["test_acceptance.py::test_a_greedy_walk_takes_the_decoders_own_forwards",
      "test_acceptance.py::test_at_temperature_1_the_expected_rounds_are_those_of_all_ways_to_draft_and_accept"]),

    # ---- results/: the check, the cards
    ("the check is inside whatever the run has learned", "results/check.py",
     "        if not low <= x <= high:", "        if False:",
     ["test_results.py::test_the_check_is_outside_beyond_three_standard_deviations_of_the_range[0.1062-+0.0001]"]),
    ("the check trains with a seed of the record, which proves nothing", "results/check.py",
     'seed = seed or max(record["seeds"]) + 1', 'seed = seed or max(record["seeds"])',
     ["test_results.py::test_the_check_is_outside_beyond_three_standard_deviations_of_the_range[0.1061-None]"]),
    ("a plain GPT is measured on targets that models with heads are not", "results/plain.py",
     "with_heads(model.to(device), K), val", "model.to(device), val",
     ["test_results.py::test_a_plain_gpt_is_measured_on_the_targets_of_a_model_with_heads"]),
    ("a micro-batch fits before AdamW's moments are there, and not after", "results/cards.py",
     "        for _ in range(2):\n", "        for _ in range(1):\n",
     ["test_results.py::test_the_micro_batch_is_halved_until_two_steps_fit"]),

    # ---- extend.py and data/
    ("an extension replaces the checkpoint that it extends", "extend.py",
     "if Path(cfg.out).resolve() == folder:", "if False:",
     ["test_extend.py::test_nothing_of_another_run_is_overwritten"]),
    ("a looped head is the old head itself, not a copy", "extend.py",
     "    return new.train(model.training)\n",
     "    new.heads = torch.nn.ModuleList(new.heads[k % m] for k in range(n_mtp))\n    return new.train(model.training)\n",
     ["test_extend.py::test_heads_are_copied_and_not_shared"]),
    ("every new head is a copy of the last one", "extend.py",
     "model.heads[k % m].state_dict()", "model.heads[m - 1].state_dict()",
     ["test_extend.py::test_heads_are_copied_and_not_shared"]),
    ("trunk and old heads are not frozen during the extension", "extend.py",
     "model.requires_grad_(False)", "pass",
     ["test_extend.py::test_training_moves_the_new_heads_alone"]),
    ("whatever a server sends is kept as data, be it an error page", "data/download.py",
     "        check(part)\n", "        pass\n",
     ["test_prepare.py::test_a_wrong_shard_is_never_kept"]),
    ("token ids are not checked against the vocabulary", "data/dataset.py",
     "if ids.max() >= vocab_size:", "if False:",
     ["test_prepare.py::test_load_refuses_a_damaged_dataset"]),
    ("a text that grows while it is prepared gets the sha256 of what it was before", "data/prepare.py",
     "    if documents.digest.hexdigest() != digest:", "    if False:",
     ["test_prepare.py::test_a_text_that_grows_between_the_passes_is_noticed"]),
    ("where two merged pairs touch, the pair between them is counted twice", "data/tokenizer.py",
     "(after != EMPTY) & (after != new)", "after != EMPTY",
     ["test_tokenizer.py::test_trainer_agrees_on_runs_and_few_letters"]),
    ("a terminal obeys the escape sequences of a generated text", "data/errors.py",
     "or not stream.isatty():", "or True:",
     ["test_printable.py::test_a_prompt_and_the_text_generated_after_it"]),
    ("on a shared disk another computer's running prepare.py is cleared away", "data/temporary.py",
     'if host != HOST or os.name == "nt":', 'if os.name == "nt":',
     ["test_prepare.py::test_what_killed_runs_left_is_cleared"]),

    # ---- data/: pretrained weights
    ("GGUF's rows of q and k are taken as they stand: the text is fluent for a few words", "data/pretrained.py",
     "return pairs.transpose(1, 2).reshape_as(weight)", "return weight.clone()",
     ["test_pretrained.py::test_a_gguf_file_is_the_model_it_says[F16]"]),
    ("the two digits of a byte of Q4_1 are neighbours", "data/weights.py",
     "np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)",
     "np.stack((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=2).reshape(-1, 32)",
     ["test_pretrained.py::test_a_gguf_file_is_the_model_it_says[Q4_1]"]),
    ("tensors that nothing reads, as biases, are ignored", "data/pretrained.py",
     "if rest:", "if False:",
     ["test_pretrained.py::test_what_cannot_be_loaded_is_one_line_and_nothing_is_written"]),
    ("a run of spaces before a digit is cut as before a word", "data/pretrained.py",
     "\\s+(?![^\\s\\p{{N}}])", "\\s+(?!\\S)",
     ["test_pretrained.py::test_ids_are_those_of_the_definition[smollm]"]),
    ("what a user writes can end the user's turn", "data/tokenizer.py",
     '+ ")", form):', '+ ")", form.replace("{}", text)):',
     ["test_pretrained.py::test_a_chat_is_the_template_with_the_text_as_plain_text"]),
    ("flags that are given for the first heads give way to their recipe", "extend.py",
     "**{**changes, **given})", "**{**given, **changes})",
     ["test_first_heads.py::test_flags_of_the_loss"]),
    ("a chat goes on past its end token, up to the end of a text", "decode.py",
     "tokenizer.end if cfg.stop", "tokenizer.eot if cfg.stop",
     ["test_first_heads.py::test_a_chat_ends_at_its_end_token"]),
    ("all prompts of a model's own text are of one kind", "data/selftext.py",
     "sources[row % len(sources)]()", "sources[0]()",
     ["test_selftext.py::test_rows_begin_with_their_prompts_and_go_on_to_the_length"]),
    ("ids that only pad the vocabulary are kept, and the dataset can't be opened", "data/selftext.py",
     "ids[ids >= len(sizes)] = eot", "sizes = np.append(sizes, [1] * 64)",
     ["test_selftext.py::test_ids_of_a_padded_vocabulary_never_come_out"]),
]


def named(mutations):
    """all tests that these mutations name, each once"""
    return list(dict.fromkeys(test for *_, tests in mutations for test in tests))


def copy_to(folder):
    """the code and its tests alone: no data sets, checkpoints, caches"""
    for pattern in ("*.py", "*.toml", "data/*.py", "data/*.xz", "data/README.md", "fast/*.py",
                    "tests/*.py", "tests/*.json", "results/*.py"):
        for path in ROOT.glob(pattern):
            target = Path(folder) / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)


def run(folder, tests):
    """-> pytest's output; it ends with `N passed in ..`, or with a line `FAILED tests/..` for each failure before that"""
    command = [sys.executable, "-m", "pytest", "--tb=no", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
                          capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=600)
    return done.stdout + done.stderr


def check(file, snippet, mistake, tests):
    """-> "caught", "skipped: ..", or what happened instead"""
    with tempfile.TemporaryDirectory() as folder:  # a fresh copy each: Python might take what it cached of the last one
        copy_to(folder)
        source = (Path(folder) / file).read_text(encoding="utf-8")
        if source.count(snippet) != 1:
            if not os.environ.get("CI"):
                return "skipped: written anew"
            return f"SNIPPET NOT FOUND once, but {source.count(snippet)} times"
        (Path(folder) / file).write_text(source.replace(snippet, mistake), encoding="utf-8")
        output = run(folder, tests)
    missing = [test for test in tests if f"FAILED tests/{test}" not in output]
    return f"SURVIVED {', '.join(missing)}: {output.strip().splitlines()[-1]}" if missing else "caught"


def main(numbers):
    """-> how many were not caught"""
    chosen, begin = [MUTATIONS[n] for n in numbers], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy_to(folder)
        output = run(folder, named(chosen))
    if "FAILED" in output or "ERROR" in output:
        print(f"{output}\nthese tests must pass on the code as it is, before a mistake is put into it")
        return len(chosen)
    bad = 0
    with ThreadPoolExecutor(2) as pool:  # two at a time: the threads only wait for the processes that they start
        for n, m, result in zip(numbers, chosen, pool.map(lambda m: check(*m[1:]), chosen)):
            bad += result not in ("caught", "skipped: written anew")
            print(f"{n:3} {result:8} {m[1]}: {m[0]}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} caught or skipped in {time.perf_counter() - begin:.0f} s")
    return bad


if __name__ == "__main__":
    if not all(given == "--list" or given.isdecimal() for given in sys.argv[1:]):
        sys.exit(__doc__)
    if "--list" in sys.argv:
        for n, (what, file, snippet, mistake, tests) in enumerate(MUTATIONS):
            print(f"{n:3} {file}: {what}\n      - {snippet.strip()}\n      + {mistake.strip()}\n      {', '.join(tests)}")
    else:
        sys.exit(main([int(n) for n in sys.argv[1:]] or range(len(MUTATIONS))) > 0)
