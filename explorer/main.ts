// What the built file holds: the element, and the numbers behind it for the tests.

import { Explorer } from "./element.js";
import { bytesOf, SeqparError, table, vectors } from "./plan.js";
import { fromHash, worldOf } from "./setting.js";
import { flightOf, framesOf, STEPS } from "./steps.js";
import { codeOf } from "./words.js";

/** All numbers of a setting, as JSON can hold them, or the error. */
export function answer(setting: Record<string, string>): object {
  try {
    const { plan, sizes, exchange } = worldOf({ ...fromHash(""), ...setting });
    const matrices = (["query", "kv", "kv once"] as const).map((heads) => [heads, vectors(plan, heads)]);
    const bytes = bytesOf(plan, sizes.batch, sizes.headDim, sizes.itemSize);
    return {
      plan: { ...plan, table: table(plan) },
      vectors: Object.fromEntries(matrices),
      bytes: bytes.map((row) => row.map(String)),
      wire: exchange?.wire ?? null,
    };
  } catch (error) {
    if (!(error instanceof SeqparError)) throw error;
    return { error: `${error.kind}: ${error.message}` };
  }
}

/** What every step shows of a setting that can be drawn: frames by rank, blocks by sender and receiver, and code. */
export function shown(setting: Record<string, string>): object {
  const { exchange } = worldOf({ ...fromHash(""), ...setting });
  if (exchange === null) return {};
  const ranks = exchange.plan.tokenRuns.map((_, rank) => rank);
  const steps = STEPS.map((step) => {
    const frames = ranks.map((rank) => framesOf(exchange, step, rank));
    const blocks = ranks.map((sender) => ranks.map((receiver) => flightOf(exchange, step, sender, receiver)));
    return [step, { frames, blocks: step.endsWith("in flight") ? blocks : [], code: codeOf(exchange, step) }];
  });
  return Object.fromEntries(steps);
}

globalThis.customElements?.define("seqpar-explorer", Explorer);
