// `npm run build` writes docs/explorer.js. Its first line holds a hash of the sources, by which a test, which needs no
// node, knows that it is stale.

import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { build } from "esbuild";

const folder = new URL(".", import.meta.url);
const sources = readdirSync(folder)
  .filter((name) => /\.(ts|css|js|json)$/.test(name))
  .sort();
const hash = createHash("sha256");
for (const name of sources) hash.update(name).update(readFileSync(new URL(name, folder)));

await build({
  absWorkingDir: folder.pathname,
  entryPoints: ["main.ts"],
  outfile: "../docs/explorer.js",
  bundle: true,
  format: "iife",
  globalName: "seqparExplorer",
  target: "es2022",
  charset: "utf8",
  loader: { ".css": "text" },
  banner: {
    js: `// Made from explorer/*.ts by "npm run build"; do not edit. Sources: ${hash.digest("hex")}`,
  },
});
