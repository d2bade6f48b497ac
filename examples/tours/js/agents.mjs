// `node agents.mjs NAME`: a coding agent, its own program unchanged, reads and edits a file and runs a command, then
// goes on with that session.
//
// A proxy between agent and fleet notes every call, so that one which was refused fails the tour although the agent
// goes on without it. What was asked and answered is left in `calls.json` beside this script.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import path from 'node:path'
import { check, end, fleet } from './checks.mjs'

const [, , name] = process.argv
const target = (process.env.ACTOR_URL || fleet.url).replace(/\/+$/, '')
const here = import.meta.dirname
const home = path.join(here, 'home')
const work = path.join(here, 'work')
const notes = path.join(work, 'notes.txt')
const LIMIT_MS = 180_000
const AGAIN = 'It says hello.'
const DONE = 'The note is corrected.'
const PATCH = '*** Begin Patch\n*** Update File: notes.txt\n@@\n-helo world\n+hello world\n*** End Patch'
const calls = []

// Start the proxy; returns its URL.
async function proxy() {
  const server = http.createServer(async (asked, answer) => {
    const parts = []
    for await (const part of asked) parts.push(part)
    const body = Buffer.concat(parts)
    const call = { method: asked.method, path: asked.url, headers: asked.headers, body: body.toString(), status: 0, answer: '' }
    calls.push(call)
    const headers = { ...asked.headers, host: new URL(target).host }
    const onward = http.request(target + asked.url, { method: asked.method, headers }, (answered) => {
      call.status = answered.statusCode
      call.answered = answered.headers
      answer.writeHead(answered.statusCode, answered.headers)
      answered.on('data', (part) => (call.answer += part))
      answered.pipe(answer)
    })
    onward.on('error', (error) => answer.destroy(error))
    answer.on('close', () => onward.destroy())
    onward.end(body)
  })
  await new Promise((ready) => server.listen(0, '127.0.0.1', ready))
  return `http://127.0.0.1:${server.address().port}`
}

// Return a task: words for a model that can do it, and the steps that the model of the tour's own fleet takes.
function task(words, steps) {
  return `${words}\n<steps>${Buffer.from(JSON.stringify(steps)).toString('base64')}</steps>`
}

function write(folder, file, text) {
  mkdirSync(path.dirname(path.join(folder, file)), { recursive: true })
  writeFileSync(path.join(folder, file), text)
}

// Per agent: its command, what the command is to go on with the last session, its variables and the files of its
// settings, and the steps in its tools.
const AGENTS = {
  'claude-code': (url) => ({
    words: ['claude', '-p', '--permission-mode', 'acceptEdits', '--allowedTools', 'Read,Edit,Bash', '--model', fleet.base],
    again: ['claude', '-p', '--continue', '--model', fleet.base],
    variables: {
      ANTHROPIC_BASE_URL: url,
      ANTHROPIC_API_KEY: fleet.key,
      ANTHROPIC_SMALL_FAST_MODEL: fleet.base,
      ANTHROPIC_DEFAULT_HAIKU_MODEL: fleet.base,
      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: '1',
      DISABLE_TELEMETRY: '1',
      DISABLE_ERROR_REPORTING: '1',
      DISABLE_AUTOUPDATER: '1',
    },
    steps: [
      { name: 'Read', arguments: { file_path: notes } },
      { name: 'Edit', arguments: { file_path: notes, old_string: 'helo', new_string: 'hello' } },
      { name: 'Bash', arguments: { command: 'cp notes.txt seen.txt', description: 'Copy the note' } },
    ],
  }),
  codex: (url) => {
    write(home, '.codex/config.toml', [
      `model = "${fleet.base}"`,
      'model_provider = "fleet"',
      'check_for_update_on_startup = false',
      '[analytics]',
      'enabled = false',
      '[model_providers.fleet]',
      'name = "fleet"',
      `base_url = "${url}/v1"`,
      'env_key = "FLEET_KEY"',
      'wire_api = "responses"',
    ].join('\n'))
    return {
      words: ['codex', 'exec', '--skip-git-repo-check', '--dangerously-bypass-approvals-and-sandbox'],
      again: ['codex', 'exec', '--skip-git-repo-check', 'resume', '--last'],
      variables: { CODEX_HOME: path.join(home, '.codex'), FLEET_KEY: fleet.key },
      steps: [
        { name: 'exec_command', arguments: { cmd: 'cat notes.txt' } },
        { name: 'exec_command', arguments: { cmd: `apply_patch <<'EOF'\n${PATCH}\nEOF` } },
        { name: 'exec_command', arguments: { cmd: 'cp notes.txt seen.txt' } },
      ],
    }
  },
  'qwen-code': (url) => {
    write(home, '.qwen/settings.json', JSON.stringify({ privacy: { usageStatisticsEnabled: false }, telemetry: { enabled: false }, general: { enableAutoUpdate: false } }))
    return {
      words: ['qwen', '--auth-type', 'openai', '--yolo', '--chat-recording', '--prompt'],
      again: ['qwen', '--auth-type', 'openai', '--continue', '--prompt'],
      variables: { OPENAI_API_KEY: fleet.key, OPENAI_BASE_URL: `${url}/v1`, OPENAI_MODEL: fleet.base },
      steps: [
        { name: 'read_file', arguments: { file_path: notes } },
        { name: 'edit', arguments: { file_path: notes, old_string: 'helo', new_string: 'hello' } },
        { name: 'run_shell_command', arguments: { command: 'cp notes.txt seen.txt', is_background: false } },
      ],
    }
  },
  opencode: (url) => {
    const provider = {
      npm: '@ai-sdk/openai-compatible',
      options: { baseURL: `${url}/v1`, apiKey: fleet.key },
      models: { [fleet.base]: { name: fleet.base, limit: { context: 100_000, output: 4096 } } },
    }
    const model = `fleet/${fleet.base}`
    write(work, 'opencode.json', JSON.stringify({ provider: { fleet: provider }, model, small_model: model, autoupdate: false, share: 'disabled' }))
    return {
      words: ['opencode', 'run'],
      again: ['opencode', 'run', '--continue'],
      variables: { OPENCODE_DISABLE_MODELS_FETCH: '1', OPENCODE_DISABLE_AUTOUPDATE: '1' },
      steps: [
        { name: 'read', arguments: { filePath: notes } },
        { name: 'edit', arguments: { filePath: notes, oldString: 'helo', newString: 'hello' } },
        { name: 'bash', arguments: { command: 'cp notes.txt seen.txt', description: 'Copy the note' } },
      ],
    }
  },
}

// Run a command of the agent in its folder; returns what it said.
async function run([program, ...words], variables) {
  const bin = path.join(here, 'node_modules/.bin')
  const environment = { PATH: `${bin}:${process.env.PATH}`, HOME: home, TERM: 'dumb', NO_COLOR: '1', ...variables }
  const child = spawn(path.join(bin, program), words, {
    cwd: work, env: environment, stdio: ['ignore', 'pipe', 'inherit'], timeout: LIMIT_MS, killSignal: 'SIGKILL',
  })
  let said = ''
  child.stdout.on('data', (part) => (said += part))
  const code = await new Promise((ended, failed) => child.on('close', ended).on('error', failed))
  process.stderr.write(said)
  assert.equal(code, 0, `it ended with ${code}: ${said.slice(-300)}`)
  return said
}

for (const folder of [home, work]) {
  rmSync(folder, { recursive: true, force: true })
  mkdirSync(folder)
}
writeFileSync(notes, 'helo world\n')
const { words, again, variables, steps } = AGENTS[name](await proxy())
await check('a file is read and edited by its tools, a command is run, and the answer said', async () => {
  const said = await run([...words, task(`Correct the word "helo" in ${notes} to "hello", and say: ${DONE}`, [...steps, DONE])], variables)
  assert.equal(readFileSync(notes, 'utf8'), 'hello world\n')
  if (process.env.ACTOR_URL) assert.equal(readFileSync(path.join(work, 'seen.txt'), 'utf8'), 'hello world\n')
  assert.ok(said.includes(DONE), said)
})
await check('the session is resumed', async () => {
  const numBefore = calls.length
  const said = await run([...again, task(`Say: ${AGAIN}`, [AGAIN])], variables)
  assert.ok(said.includes(AGAIN), said)
  assert.ok(calls.slice(numBefore).some((call) => call.body.includes('helo world')), 'what was read before is not sent again')
})
writeFileSync(path.join(here, 'calls.json'), JSON.stringify(calls, null, 1))
await check('no call was refused', async () => {
  assert.ok(calls.length > steps.length + 1, `${calls.length} calls`)
  for (const call of calls) assert.ok(call.status < 400, `${call.method} ${call.path}: ${call.status} ${call.answer}`)
})
end()
