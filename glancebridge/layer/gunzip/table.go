package gunzip

// An entry of a table says what the next bits mean. Its low six bits are how many are used up, those after the code among
// them; the four from bit 8 on are how many of these are the code; from bit 16 on it is a literal, or what is added to the
// bits after the code.
const (
	flagLiteral = 1 << 31
	// flagSub: the entry is another table's place, with the number of its bits in place of the code's.
	flagSub = 1 << 15
	// flagEnd: the end of a block, or, with a number, no code at all.
	flagEnd = 1 << 14

	noCode = flagEnd | 1<<16
)

const (
	litBits  = 11
	distBits = 8
	maxBits  = 15
)

// The tables have room for all further ones that complete codes can ask for (enough.c of zlib: 2342 and 402).
type (
	litTable  [4096]uint32
	distTable [512]uint32
)

// The meaning of each symbol: the upper bits of its entry, and the bits after the code in the low ones.
var (
	litMeaning  [288]uint32
	distMeaning [32]uint32
	lenMeaning  [19]uint32
)

func init() {
	for i := range 256 {
		litMeaning[i] = flagLiteral | uint32(i)<<16
	}
	litMeaning[256] = flagEnd
	base := uint32(3)
	for i := range 28 {
		extra := uint32(max(0, i/4-1))
		litMeaning[257+i] = base<<16 | extra
		base += 1 << extra
	}
	litMeaning[285] = 258 << 16
	litMeaning[286], litMeaning[287] = noCode, noCode
	base = 1
	for i := range 30 {
		extra := uint32(max(0, i/2-1))
		distMeaning[i] = base<<16 | extra
		base += 1 << extra
	}
	distMeaning[30], distMeaning[31] = noCode, noCode
	for i := range lenMeaning {
		lenMeaning[i] = uint32(i) << 16
	}
}

// build makes a table that is looked up by bits bits of the codes with these lengths. False: they are no code. As in zlib a
// single code may leave half of the bits without a meaning, and there may be none at all.
func build(table []uint32, bits uint, lens []uint8, meaning []uint32) bool {
	var count [maxBits + 1]int
	for _, l := range lens {
		count[l]++
	}
	for i := range table[:1<<bits] {
		table[i] = noCode
	}
	if count[0] == len(lens) {
		return true
	}
	count[0] = 0
	var next [maxBits + 2]uint32
	code, codes := uint32(0), 0
	for l := 1; l <= maxBits; l++ {
		next[l] = code
		code = (code + uint32(count[l])) << 1
		codes += count[l]
	}
	if code>>1 != 1<<maxBits && (codes != 1 || count[1] != 1) {
		return false
	}
	// The length of the longest code that begins with these bits, for the tables behind the first.
	var longest [1 << litBits]uint8
	first := next
	for _, l := range lens {
		if l == 0 {
			continue
		}
		c := reverse(first[l], uint(l))
		first[l]++
		if uint(l) > bits {
			at := &longest[c&(1<<bits-1)]
			*at = max(*at, l)
		}
	}
	free := uint32(1) << bits // where the next table goes
	for sym, l := range lens {
		if l == 0 {
			continue
		}
		n := uint(l)
		c := reverse(next[l], n)
		next[l]++
		e := entry(meaning[sym], n)
		if n <= bits {
			for i := c; i < 1<<bits; i += 1 << n {
				table[i] = e
			}
			continue
		}
		head := c & (1<<bits - 1)
		if table[head]&flagSub == 0 {
			sub := uint(longest[head]) - bits
			if free+1<<sub > uint32(len(table)) {
				return false
			}
			table[head] = free<<16 | flagSub | uint32(sub)<<8
			free += 1 << sub
		}
		sub, at := uint(table[head]>>8&15), table[head]>>16
		for i := c >> bits; i < 1<<sub; i += 1 << (n - bits) {
			table[at+i] = e
		}
	}
	return true
}

// entry is that of a symbol whose code has n bits.
func entry(meaning uint32, n uint) uint32 {
	if meaning&flagLiteral != 0 || meaning&flagEnd != 0 {
		return meaning | uint32(n)
	}
	extra := meaning & 15
	return meaning&^15 | uint32(n)<<8 | uint32(n) + extra
}

func reverse(code uint32, n uint) uint32 {
	var r uint32
	for range n {
		r = r<<1 | code&1
		code >>= 1
	}
	return r
}
