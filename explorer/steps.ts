// What each step shows: for every rank its tensors and buffers, each a frame of blocks. A block is what one rank's
// tokens have of another rank's heads; it keeps its name and its colours on its way.

import { count, type Run } from "./plan.js";
import { shapeOf, type Exchange } from "./setting.js";
import { runsOfTensor, totalHeads, type Cut, type Route, type Tensor } from "./wire.js";

export const STEPS = [
  "shards",
  "pack",
  "in flight",
  "arrived",
  "unpack",
  "attention",
  "pack output",
  "output in flight",
  "output arrived",
  "unpack output",
] as const;
export type Step = (typeof STEPS)[number];

export interface Block {
  tensor: Tensor;
  tokensOf: number; // the rank that owns its tokens, outside attention
  headsOf: number; // the rank that owns its heads, inside attention
}

/** Where a block lies in its frame: `at` are places in it, 0 to 1; `slice` is how Python writes it. */
export interface Tile extends Block {
  at: { left: number; top: number; width: number; height: number };
  slice: string;
}

export interface Frame {
  kind: "tensor" | "buffer" | "kept";
  name: string;
  shape: string;
  weight: number; // of its width, beside the other frames of a rank
  tiles: Tile[];
}

export const SHOWN_ROWS = 3n; // of the batch; the others look the same
const SHOWN_KV_HEADS = 8;

export function framesOf(exchange: Exchange, step: Step, rank: number): Frame[] {
  const back = [exchange.back[rank]];
  switch (step) {
    case "shards":
      return (["query", "key", "value"] as const).map((tensor) => shard(exchange, tensor, rank));
    case "pack":
      return exchange.there[rank].flatMap((route) => buffers(exchange, route, route.byHeads, "send", rank));
    case "arrived":
      return exchange.there[rank].flatMap((route) =>
        buffers(exchange, route, route.byTokens, "receive", rank),
      );
    case "unpack":
      return (["query", "key", "value"] as const).map((tensor) => whole(exchange, tensor, rank));
    case "attention":
      return [whole(exchange, "output", rank)];
    case "pack output":
      return back.flatMap((route) => buffers(exchange, route, route.byTokens, "send", rank));
    case "output arrived":
      return back.flatMap((route) => buffers(exchange, route, route.byHeads, "receive", rank));
    case "unpack output":
      return [shard(exchange, "output", rank)];
    default:
      return []; // in flight, blocks are on no rank: see flightOf
  }
}

/** The blocks under way from one rank to another. */
export function flightOf(exchange: Exchange, step: Step, sender: number, receiver: number): Block[] {
  const back = step === "output in flight";
  const [tokensOf, headsOf] = back ? [receiver, sender] : [sender, receiver];
  const tensors: Tensor[] = back ? ["output"] : ["query", "key", "value"];
  return tensors
    .map((tensor) => ({ tensor, tokensOf, headsOf }))
    .filter((block) => elementsOf(exchange, block) > 0n);
}

export function elementsOf({ plan, sizes }: Exchange, { tensor, tokensOf, headsOf }: Block): bigint {
  const vectors = count(plan.tokenRuns[tokensOf]) * count(runsOfTensor(plan, tensor)[headsOf]);
  return sizes.batch * sizes.headDim * BigInt(vectors);
}

/** Which of the rank's query heads use which kv head, of the first few; see own_heads.py. */
export function usesOf({ plan }: Exchange, rank: number): { uses: [Run, number][]; expand: boolean } {
  const ratio = plan.heads / plan.kvHeads;
  const query = plan.headRuns.query[rank];
  const kv = plan.headRuns.kv[rank];
  const usersOf = (head: number): Run => ({
    first: Math.max(head * ratio, query.first),
    end: Math.min((head + 1) * ratio, query.end),
  });
  const shown = Array.from({ length: Math.min(count(kv), SHOWN_KV_HEADS) }, (_, i) => kv.first + i);
  const sizes = [kv.first, kv.first + 1, kv.end - 1].filter((head) => head >= kv.first && head < kv.end);
  const expand = new Set(sizes.map((head) => count(usersOf(head)))).size > 1;
  return { uses: shown.map((head) => [usersOf(head), head]), expand };
}

/** How the exchange of a step is packed or unpacked on each rank: the code beside it depends on it. */
export function cutsOf(exchange: Exchange, step: Step, rank: number): Cut[] {
  if (step === "pack") return exchange.there[rank].map((route) => route.byHeads);
  if (step === "unpack") return exchange.there[rank].map((route) => route.byTokens);
  if (step === "pack output") return [exchange.back[rank].byTokens];
  return [exchange.back[rank].byHeads];
}

/** All heads of the rank's tokens. A head that several ranks need is drawn in as many stripes. */
function shard(exchange: Exchange, tensor: Tensor, rank: number): Frame {
  const { plan } = exchange;
  const runs = runsOfTensor(plan, tensor);
  const stripes = stripesOf(runs);
  const heads = spread(stripes.map(([left, right]) => right - left));
  const tokens = count(plan.tokenRuns[rank]) > 0 ? spread([1]) : spread([0]);
  const tiles = runs.flatMap((run, headsOf) => {
    const slice = sliceOf(tensor, exchange.layout, ":", `${run.first}:${run.end}`);
    return placed(exchange, { tensor, tokensOf: rank, headsOf }, tokens[0], heads[headsOf], slice);
  });
  return tensorFrame(
    exchange,
    tensor,
    BigInt(count(plan.tokenRuns[rank])),
    BigInt(totalHeads(plan, tensor)),
    tiles,
  );
}

/** All tokens of the rank's heads. */
function whole(exchange: Exchange, tensor: Tensor, rank: number): Frame {
  const { plan } = exchange;
  const held = count(runsOfTensor(plan, tensor)[rank]);
  const tokens = spread(plan.tokenRuns.map(count));
  const heads = spread([held]);
  const tiles = plan.tokenRuns.flatMap((run, tokensOf) => {
    const slice = sliceOf(tensor, exchange.layout, `${run.first}:${run.end}`, ":");
    return placed(exchange, { tensor, tokensOf, headsOf: rank }, tokens[tokensOf], heads[0], slice);
  });
  return tensorFrame(exchange, tensor, BigInt(plan.tokens), BigInt(held), tiles);
}

function tensorFrame(
  exchange: Exchange,
  tensor: Tensor,
  tokens: bigint,
  heads: bigint,
  tiles: Tile[],
): Frame {
  const shape = shapeOf(exchange.layout, exchange.sizes, tokens, heads);
  return { kind: "tensor", name: tensor, shape, weight: Number(heads), tiles };
}

/** A block's rectangles: one for each row of the batch where that comes first in memory. */
function placed(exchange: Exchange, block: Block, tokens: Span, heads: Span, slice: string): Tile[] {
  if (elementsOf(exchange, block) === 0n) return [];
  const { layout, sizes } = exchange;
  const [down, across] = layout === "b h s d" ? [heads, tokens] : [tokens, heads];
  const rows = layout.startsWith("s") ? 1 : Number(sizes.batch < SHOWN_ROWS ? sizes.batch : SHOWN_ROWS);
  return Array.from({ length: rows }, (_, row) => {
    const at = {
      left: across[0],
      width: across[1] - across[0],
      top: (row + down[0]) / rows,
      height: (down[1] - down[0]) / rows,
    };
    return { ...block, at, slice };
  });
}

/** The buffer of a cut, and beside it what the rank keeps. */
function buffers(
  exchange: Exchange,
  route: Route,
  cut: Cut,
  verb: "send" | "receive",
  rank: number,
): Frame[] {
  const byHeads = cut === route.byHeads;
  const blockOf = (tensor: Tensor, other: number): Block =>
    byHeads ? { tensor, tokensOf: rank, headsOf: other } : { tensor, tokensOf: other, headsOf: rank };
  const spans = spread(cut.pieces.map((piece) => Number(piece.end - piece.begin)));
  const tiles = cut.pieces.flatMap((piece, i) => {
    if (piece.begin === piece.end) return [];
    const at = { left: spans[i][0], width: spans[i][1] - spans[i][0], top: 0, height: 1 };
    return [
      { ...blockOf(piece.tensor, piece.rank), at, slice: `${verb} buffer[${piece.begin}:${piece.end}]` },
    ];
  });
  const names = cut.tensors.length > 1 ? "query, key, value" : cut.tensors[0];
  const buffer: Frame = {
    kind: "buffer",
    name: `${verb} buffer: ${names}`,
    shape: `(${cut.elements},)`,
    weight: 1,
    tiles,
  };
  return cut.kept
    ? [
        buffer,
        keptFrame(
          exchange,
          cut.tensors.map((tensor) => blockOf(tensor, rank)),
          names,
        ),
      ]
    : [buffer];
}

/** Where a rank's own chunk is copied from tensor to tensor. */
function keptFrame(exchange: Exchange, blocks: Block[], names: string): Frame {
  const spans = spread(blocks.map((block) => Number(elementsOf(exchange, block))));
  const tiles = blocks.flatMap((block, i) => {
    if (elementsOf(exchange, block) === 0n) return [];
    const at = { left: spans[i][0], width: spans[i][1] - spans[i][0], top: 0, height: 1 };
    return [{ ...block, at, slice: "in no buffer: copied from tensor to tensor" }];
  });
  return { kind: "kept", name: `stays here: ${names}`, shape: "", weight: 1, tiles };
}

function sliceOf(tensor: Tensor, layout: string, tokens: string, heads: string): string {
  const index: Record<string, string> = { b: ":", s: tokens, h: heads, d: ":" };
  return `${tensor}[${layout
    .split(" ")
    .map((word) => index[word])
    .join(", ")}]`;
}

type Span = [number, number];

/** Lengths beside each other, to scale but for those that would be too thin to see; they fill 0 to 1. */
export function spread(lengths: number[]): Span[] {
  const total = lengths.reduce((sum, length) => sum + length, 0);
  const thinnest = 0.4 / Math.max(1, lengths.filter((length) => length > 0).length);
  const widths = lengths.map((length) => (length > 0 ? Math.max(length / total, thinnest) : 0));
  const width = widths.reduce((sum, width) => sum + width, 0) || 1;
  let end = 0;
  return widths.map((own) => [end / width, (end += own) / width]);
}

/** Left and right of each rank's heads, in heads. Of a head with n holders each has one n-th. */
function stripesOf(runs: Run[]): Span[] {
  const edge = (head: number, rank: number, right: number): number => {
    const holders = runs.flatMap((run, holder) => (run.first <= head && head < run.end ? [holder] : []));
    return head + (holders.indexOf(rank) + right) / holders.length;
  };
  return runs.map((run, rank) =>
    count(run) === 0 ? [0, 0] : [edge(run.first, rank, 0), edge(run.end - 1, rank, 1)],
  );
}
