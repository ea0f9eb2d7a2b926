#!/bin/sh
# Rebuilds d3.min.js and d3.LICENSE.txt from the npm packages named in README.md. Run it in this folder; needs npm.
set -eu
here=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --no-audit --no-fund --ignore-scripts d3-zoom@3.0.0 d3-dispatch@3.0.2 d3-selection@3.0.0 d3-timer@3.0.2 d3-color@3.1.1 \
  d3-interpolate@3.0.2 d3-ease@3.0.2 d3-transition@3.0.2 d3-drag@3.0.1 >/dev/null
: >"$here/d3.min.js"
: >"$here/d3.LICENSE.txt"
for name in dispatch selection timer color interpolate ease transition drag zoom; do
  cat "node_modules/d3-$name/dist/d3-$name.min.js" >>"$here/d3.min.js"
  printf '\n' >>"$here/d3.min.js"
  version=$(node -p "require('./node_modules/d3-$name/package.json').version")
  { printf '===== d3-%s %s =====\n' "$name" "$version"; cat "node_modules/d3-$name/LICENSE"; printf '\n'; } >>"$here/d3.LICENSE.txt"
done
