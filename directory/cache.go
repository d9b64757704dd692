package directory

import (
	"time"

	"github.com/maypok86/otter/v2"
	"github.com/maypok86/otter/v2/stats"

	"github.com/kmehsm/kmehsm/directory/internal/packed"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// A Cache is memory for what Readers have read: for all together, so much as NewCache says, however many they are. It
// may be used concurrently.
type Cache struct {
	shards *otter.Cache[cacheKey, *packedShard]
	parts  *otter.Cache[cacheKey, *storedPart] // of revocations
}

// DefaultCacheBytes is the size of a Reader's Cache where it gets none.
const DefaultCacheBytes = 64 << 20

// NewCache makes a Cache of so many bytes. recorder counts its hits and misses; it may be nil.
func NewCache(bytes int64, recorder stats.Recorder) *Cache {
	const overhead = 256 // of an entry, about
	return &Cache{
		shards: otter.Must(&otter.Options[cacheKey, *packedShard]{
			StatsRecorder: recorder,
			MaximumWeight: uint64(bytes - bytes/8),
			Weigher:       func(_ cacheKey, s *packedShard) uint32 { return uint32(s.keys.Bytes() + overhead) },
			ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[cacheKey, *packedShard]) time.Duration {
				if e.Value.keys.Bytes() == 0 {
					return e.Key.reader.o.NegativeTTL
				}
				return 365 * 24 * time.Hour // a published shard never changes
			}),
		}),
		parts: otter.Must(&otter.Options[cacheKey, *storedPart]{
			MaximumWeight: uint64(bytes / 8),
			Weigher:       func(_ cacheKey, p *storedPart) uint32 { return uint32(p.size + overhead) },
		}),
	}
}

// A cacheKey is a shard's, or a part's: what one reader has verified is no other's.
type cacheKey struct {
	reader *Reader
	lot    string
	n      int
}

// A packedShard is a verified shard. One that is not in the store has no keys.
type packedShard struct {
	first int // position of the first key
	keys  packed.Keys
	pkg   strict.Base64
}
