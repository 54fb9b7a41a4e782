package fs

import (
	"os"
	"time"
)

// Stats are the counters of a mount since its server started, as .imgfs/stats.json has
// them.
type Stats struct {
	PID        int              `json:"pid"`
	Supervisor int              `json:"supervisor,omitempty"` // PID of what starts another server when this one ends
	Restarts   int              `json:"restarts"`             // servers of the mount before this one
	LastEnd    string           `json:"lastEnd,omitempty"`    // how the last of them ended
	Started    time.Time        `json:"started"`
	Fuse       map[string]int64 `json:"fuse"` // messages by operation
	Registry   struct {
		Requests int64 `json:"requests"`
		Bytes    int64 `json:"bytes"`
		Retries  int64 `json:"retries"`
	} `json:"registry"`
	Cache struct {
		Limit int64 `json:"limit"` // bytes
		Used  int64 `json:"used"`
		Free  int64 `json:"free"`
	} `json:"cache"`
	Catalogue struct {
		Reads int64 `json:"reads"` // records
	} `json:"catalogue"`
	Errors int64 `json:"errors"` // that were noted, repetitions included
}

// Stats returns the counters.
func (s *Server) Stats() Stats { return s.fs.stats() }

// Events returns .imgfs/events as it is now: a JSON object on each line. The caller
// does not change it.
func (s *Server) Events() []byte {
	data, _ := s.fs.events.contents()
	return data
}

func (f *fileSystem) stats() Stats {
	s := Stats{PID: os.Getpid(), Started: f.started.UTC(), Supervisor: f.o.Supervisor, Restarts: f.o.Restarts, LastEnd: f.o.LastEnd, Fuse: map[string]int64{}}
	if os.Getppid() != s.Supervisor {
		s.Supervisor = 0 // it has died
	}
	for i, name := range opNames {
		s.Fuse[name] = f.counts[i].Load()
	}
	for _, h := range f.store.Traffic().Hosts {
		s.Registry.Requests += h.Requests
		s.Registry.Bytes += h.Bytes
		s.Registry.Retries += h.Retries
	}
	u := f.store.Usage()
	s.Cache.Limit, s.Cache.Used, s.Cache.Free = u.Limit, u.Used, u.Free
	s.Catalogue.Reads = f.store.CatalogReads()
	s.Errors = f.errors.count()
	return s
}
