// What is said beside the pictures: a sentence for each step, the code that belongs to it, and what a block is.

import fromPython from "./from_python.json";
import { count, describe, type Run } from "./plan.js";
import type { Exchange } from "./setting.js";
import { cutsOf, elementsOf, STEPS, usesOf, type Block, type Step } from "./steps.js";
import { runsOfTensor } from "./wire.js";

export interface Code {
  file: string;
  function: string;
  lines: string[];
  ranks: string; // where it does not hold for all of them
}

const LINES = fromPython.lines as Record<string, Omit<Code, "ranks">>;

export const SENTENCES: Record<Step, string> = {
  shards: "Each rank holds all heads of its own tokens: A[B, S_P, H, D].",
  pack: "Each rank writes one chunk for each rank into a flat buffer: the heads that the other one owns, of its own tokens.",
  "in flight":
    "One all-to-all carries every block from the rank that owns its tokens to the rank that owns its heads.",
  arrived:
    "The blocks stand in the receive buffer in the order of the ranks that sent them, which is the order of the tokens.",
  unpack: "Each rank puts the blocks together: all tokens of its own heads, A[B, S, H_P, D].",
  attention: "Each rank attends over all tokens with its own heads. Here the ranks do not communicate.",
  "pack output": "The way back. The chunk for a rank is the output for that rank's tokens.",
  "output in flight":
    "The second all-to-all carries every block of the output to the rank that owns its tokens.",
  "output arrived":
    "The blocks stand in the receive buffer in the order of the ranks, which is the order of the heads.",
  "unpack output": "Each rank holds the output for its own tokens, all heads: the shape that its query had.",
};

export const isBack = (step: Step): boolean => STEPS.indexOf(step) > STEPS.indexOf("attention");

/** The lines of seqpar_ref that do what the step shows, for this setting. */
export function codeOf(exchange: Exchange, step: Step): Code[] {
  const ranks = exchange.plan.tokenRuns.map((_, rank) => rank);
  const everywhere = (key: string): Code => ({ ...LINES[key], ranks: "" });
  const where = (key: string, holds: (rank: number) => boolean): Code[] => {
    const those = ranks.filter(holds);
    const said = those.length === ranks.length ? "" : `on ${ranksInWords(those)}`;
    return those.length > 0 ? [{ ...LINES[key], ranks: said }] : [];
  };
  const ways = (verb: "pack" | "unpack"): Code[] =>
    (["in order", "strided", "ragged"] as const).flatMap((way) =>
      where(`${verb} ${way}`, (rank) => cutsOf(exchange, step, rank).some((cut) => cut.way === way)),
    );
  const keeps = (rank: number): boolean =>
    (isBack(step) ? [exchange.back[rank]] : exchange.there[rank]).some((route) => route.byHeads.kept);
  const hasHeads = (rank: number): boolean => count(exchange.plan.headRuns.query[rank]) > 0;
  switch (step) {
    case "shards":
      return [everywhere("shards")];
    case "pack":
      return ways("pack");
    case "pack output":
      return [everywhere("back"), ...ways("pack")];
    case "in flight":
    case "output in flight":
      return [everywhere("in flight"), ...where("kept", keeps)];
    case "arrived":
    case "output arrived":
      return [everywhere("arrived")];
    case "attention":
      return [
        everywhere("attention"),
        everywhere("uses"),
        ...where("expand", (rank) => usesOf(exchange, rank).expand),
        ...where("no heads", (rank) => !hasHeads(rank)),
      ];
    default:
      return ways("unpack");
  }
}

export interface Fact {
  name: string;
  text: string;
}

/** What the panel says of a block. */
export function factsOf(
  exchange: Exchange,
  step: Step,
  block: Block,
  rank: number | null,
  slice: string,
): Fact[] {
  const { plan, sizes } = exchange;
  const runs = runsOfTensor(plan, block.tensor);
  const kind = block.tensor === "query" || block.tensor === "output" ? "query heads" : "kv heads";
  const tokens = `tokens ${describe(plan.tokenRuns[block.tokensOf])}`;
  const heads = `${kind} ${describe(runs[block.headsOf])}`;
  const others = sharing(runs, block.headsOf);
  const copies =
    others.length > 0 ? `; ${ranksInWords(others)} get${others.length > 1 ? "" : "s"} copies of them` : "";
  const bytes = elementsOf(exchange, block) * sizes.itemSize;
  const [from, to] = endsOf(step, block);
  const sent = from === to ? `stays on rank ${from}, none are sent` : `sent from rank ${from} to rank ${to}`;
  return [
    { name: "block", text: `${block.tensor}, ${tokens}, ${heads}` },
    {
      name: "owner",
      text: `rank ${block.tokensOf} of the tokens, rank ${block.headsOf} of the heads${copies}`,
    },
    { name: "slice", text: rank === null ? slice : `${slice} on rank ${rank}` },
    { name: "bytes", text: `${grouped(bytes)} bytes, ${sent}` },
  ];
}

/** The rank that sends a block, and the one that receives it. */
export function endsOf(step: Step, { tensor, tokensOf, headsOf }: Block): [number, number] {
  return tensor === "output" || isBack(step) ? [headsOf, tokensOf] : [tokensOf, headsOf];
}

/** "0→2" is sent from rank 0 to rank 2, "1" stays on rank 1. */
export function labelOf(step: Step, block: Block): string {
  const [from, to] = endsOf(step, block);
  return from === to ? String(from) : `${from}→${to}`;
}

export const grouped = (number: bigint | number): string => number.toLocaleString("en");

/** "rank 1", "ranks 1 and 2", "ranks 0-3". */
export function ranksInWords(ranks: number[]): string {
  if (ranks.length === 1) return `rank ${ranks[0]}`;
  const [first, last] = [ranks[0], ranks[ranks.length - 1]];
  if (ranks.length > 2 && last - first === ranks.length - 1) return `ranks ${first}-${last}`;
  return `ranks ${ranks.slice(0, -1).join(", ")} and ${last}`;
}

/** Which way the heads are divided, in words. */
export function methodOf({ plan }: Exchange): string {
  const query = plan.headRuns.query.map(count);
  const even = new Set(query).size === 1 ? "even" : "uneven";
  const copies = plan.headRuns.kv.map(count).reduce((total, own) => total + own, 0) - plan.kvHeads;
  const replicated =
    copies > 0
      ? `kv heads replicated (${copies} cop${copies > 1 ? "ies" : "y"} more)`
      : "no kv head replicated";
  return `${even}: query heads ${query.join(", ")}; ${replicated}`;
}

function sharing(runs: Run[], rank: number): number[] {
  const own = runs[rank];
  return runs.flatMap((run, other) =>
    other !== rank && run.first < own.end && own.first < run.end ? [other] : [],
  );
}
