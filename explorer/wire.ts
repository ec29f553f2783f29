// Where each block stands in the flat buffer of one all-to-all: seqpar_ref/wire.py and routes.py, for one stage.

import fromPython from "./from_python.json";
import { count, sum, vectors, type Plan, type Run } from "./plan.js";

export const LAYOUTS = ["b s h d", "s b h d", "b h s d"];
export type Tensor = "query" | "key" | "value" | "output";

/** How a cut is packed, and, where no head is in it twice, unpacked; see the docstring of wire.py. */
export type Way = "in order" | "strided" | "ragged";

export interface Sizes {
  batch: bigint;
  headDim: bigint;
  itemSize: bigint;
}

export interface Piece {
  tensor: Tensor;
  rank: number; // whose chunk it belongs to
  begin: bigint; // elements
  end: bigint;
}

/** What one rank packs, or unpacks: the pieces in the order of the buffer. `kept`: its own chunk is left out. */
export interface Cut {
  tensors: Tensor[];
  pieces: Piece[];
  elements: bigint;
  kept: boolean;
  way: Way;
}

export interface Route {
  byHeads: Cut; // of the tokens that the rank owns
  byTokens: Cut; // of the heads that the rank owns
}

const FUSED_UP_TO = BigInt(fromPython.bounds.fusedUpTo);

/** How query, key and value travel if nothing else is asked for: all in one collective, or one after the other. */
export function wireOf(plan: Plan, { batch, headDim, itemSize }: Sizes): "fused" | "pipelined" {
  const pairs = BigInt(Math.max(1, plan.ranks * (plan.ranks - 1)));
  const [query, kv] = [vectors(plan, "query"), vectors(plan, "kv")].map((matrix) =>
    BigInt(sum(matrix.map(sum))),
  );
  const mean = (batch * itemSize * headDim * (query + 2n * kv)) / pairs;
  return mean <= FUSED_UP_TO ? "fused" : "pipelined";
}

export function routeOf(plan: Plan, rank: number, layout: string, sizes: Sizes, tensors: Tensor[]): Route {
  const words = layout.split(" ");
  const before = (dim: string): string[] => words.slice(0, words.indexOf(dim));
  const runs = tensors.map((tensor) => runsOfTensor(plan, tensor));
  const totals = tensors.map((tensor) => totalHeads(plan, tensor));
  const ownTokens = BigInt(count(plan.tokenRuns[rank]));
  const lengths = (tokens: bigint, heads: bigint): Record<string, bigint> => ({
    b: sizes.batch,
    s: tokens,
    h: heads,
  });
  const product = (dims: string[], length: Record<string, bigint>): bigint =>
    dims.reduce((total, dim) => total * length[dim], 1n);

  const heads = cutOf(
    tensors,
    runs.map((own, part) => ({
      runs: own,
      total: totals[part],
      across: sizes.batch * ownTokens * sizes.headDim,
      before: product(before("h"), lengths(ownTokens, BigInt(totals[part]))),
    })),
  );
  const tokens = cutOf(
    tensors,
    runs.map((own) => ({
      runs: plan.tokenRuns,
      total: plan.tokens,
      across: sizes.batch * BigInt(count(own[rank])) * sizes.headDim,
      before: product(before("s"), lengths(BigInt(plan.tokens), BigInt(count(own[rank])))),
    })),
  );
  const kept = [heads, tokens].every((cut) => mayKeep(cut, rank, plan.ranks));
  return { byHeads: laidOut(heads, kept ? rank : null), byTokens: laidOut(tokens, kept ? rank : null) };
}

export const runsOfTensor = (plan: Plan, tensor: Tensor): Run[] =>
  plan.headRuns[tensor === "query" || tensor === "output" ? "query" : "kv"];

export const totalHeads = (plan: Plan, tensor: Tensor): number =>
  tensor === "query" || tensor === "output" ? plan.heads : plan.kvHeads;

interface Part {
  runs: Run[];
  total: number;
  across: bigint; // elements for each index along the dim of the cut
  before: bigint; // product of the dims before it
}

interface Ways {
  tensors: Tensor[];
  parts: Part[];
  way: Way;
}

function cutOf(tensors: Tensor[], parts: Part[]): Ways {
  const alone = (part: Part): boolean => part.runs.length === 1 || part.before === 1n;
  if (parts.length === 1 && isOnce(parts[0]) && alone(parts[0])) return { tensors, parts, way: "in order" };
  return { tensors, parts, way: parts.every((part) => hasStep(part.runs)) ? "strided" : "ragged" };
}

const isOnce = (part: Part): boolean => sum(part.runs.map(count)) === part.total;

/** Runs of one length, whose begins are equally far apart. */
function hasStep(runs: Run[]): boolean {
  const steps = runs.slice(1).map((run, i) => run.first - runs[i].first);
  return new Set(runs.map(count)).size <= 1 && new Set(steps).size <= 1;
}

/** Where memory and buffer are the same, what the others get has to be one piece of it. */
function mayKeep({ parts, way }: Ways, rank: number, ranks: number): boolean {
  const strided = parts.every((part) => isOnce(part) && hasStep(part.runs));
  return strided && (rank === 0 || rank === ranks - 1 || way !== "in order");
}

function laidOut({ tensors, parts, way }: Ways, kept: number | null): Cut {
  const pieces: Piece[] = [];
  let end = 0n;
  for (let rank = 0; rank < parts[0].runs.length; rank++) {
    if (rank === kept) continue;
    parts.forEach((part, i) => {
      const begin = end;
      end += BigInt(count(part.runs[rank])) * part.across;
      pieces.push({ tensor: tensors[i], rank, begin, end });
    });
  }
  return { tensors, pieces, elements: end, kept: kept !== null, way };
}
