// What the JavaScript scripts of `make tour` share; the same as checks.py beside it.
import assert from 'node:assert/strict'

export const QUESTION = 'What is the capital of France?'
export const MESSAGES = [{ role: 'user', content: QUESTION }]
export const MAX_TOKENS = 12
export const CITY = {
  type: 'object',
  properties: { name: { type: 'string' }, is_capital: { type: 'boolean' } },
  required: ['name', 'is_capital'],
  additionalProperties: false,
}

const url = (process.env.URL ?? '').replace(/\/+$/, '')
export const fleet = { url, v1: `${url}/v1`, base: 'base', adapter: process.env.ADAPTER, key: process.env.KEY || 'none' }
export const embedder = { url: process.env.EMBEDDER_URL, adapter: process.env.EMBEDDER_ADAPTER }
export const TEXTS = ['my name is ada', 'i live in london with grace']

let failed = 0

// Count `work` as one check: it fails by any exception, and the next one is tried all the same.
export async function check(name, work) {
  try {
    await work()
    console.log(`[ok] ${name}`)
  } catch (error) {
    console.error(error)
    failed += 1
    console.log(`[failed] ${name}: ${error.name}: ${String(error.message).replace(/\s+/g, ' ').slice(0, 300)}`)
  }
}

export function differ(left, right) {
  assert.ok(left?.length && right?.length, 'an answer is empty')
  assert.notDeepEqual(left, right)
}

export function end() {
  process.exit(failed > 0 ? 1 : 0)
}
