// promptfoo: one evaluation of base and adapter, with assertions on their answers, by its command.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { CITY, QUESTION, check, differ, end, fleet } from './checks.mjs'

const program = join(dirname(fileURLToPath(import.meta.url)), 'node_modules/promptfoo/dist/src/entrypoint.js')
const folder = mkdtempSync(join(tmpdir(), 'tour-'))
const env = {
  ...process.env, OPENAI_API_KEY: fleet.key, PROMPTFOO_CONFIG_DIR: folder, PROMPTFOO_DISABLE_TELEMETRY: '1',
  PROMPTFOO_DISABLE_UPDATE: '1', PROMPTFOO_DISABLE_REMOTE_GENERATION: '1',
}

function evaluate(name, providers, assertions) {
  const config = join(folder, `${name}.json`)
  const output = join(folder, `${name}.out.json`)
  writeFileSync(config, JSON.stringify({ prompts: [QUESTION], providers, tests: [{ assert: assertions }] }))
  const words = [program, 'eval', '--config', config, '--output', output, '--no-cache', '--no-progress-bar', '--no-table', '--no-write']
  try {
    execFileSync(process.execPath, words, { env, cwd: folder, stdio: 'pipe', timeout: 180_000 })
  } catch (error) {
    if (error.status !== 100) throw new Error(`${error.message}: ${error.stderr}${error.stdout}`) // 100: assertions failed
  }
  return JSON.parse(readFileSync(output)).results.results
}

const provider = (model, config) => ({
  id: `openai:chat:${model}`, label: model, config: { apiBaseUrl: fleet.v1, temperature: 0, max_tokens: 12, ...config },
})
try {
  await check('base and adapter answer differently', async () => {
    const results = evaluate('chat', [provider(fleet.base), provider(fleet.adapter)], [{ type: 'javascript', value: 'output.length > 0' }])
    assert.equal(results.length, 2)
    assert.ok(results.every((result) => result.success), JSON.stringify(results.map((result) => result.error)))
    differ(results[0].response.output, results[1].response.output)
    for (const { response } of results) assert.equal(response.tokenUsage.prompt + response.tokenUsage.completion, response.tokenUsage.total)
  })
  await check('is-json holds for a structured output', async () => {
    const form = { type: 'json_schema', json_schema: { name: 'city', schema: CITY, strict: true } }
    const held = { max_tokens: 200, response_format: form }
    const results = evaluate('json', [provider(fleet.base, held), provider(fleet.adapter, held)], [{ type: 'is-json', value: CITY }])
    assert.ok(results.every((result) => result.success), JSON.stringify(results.map((result) => result.error)))
  })
  await check('errors', async () => {
    const [result] = evaluate('errors', [provider('nobody-has-this')], [{ type: 'javascript', value: 'true' }])
    assert.equal(result.success, false)
    assert.match(result.error, /nobody-has-this/)
  })
} finally {
  rmSync(folder, { recursive: true, force: true })
}
end()
